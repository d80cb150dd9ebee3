"""The HTTP API as a FastAPI app; what it serves comes from a `Source`, so the same app runs with any model."""

import base64
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from serve import schemas
from serve.engine import Engine
from serve.limits import BodyLimit, Limits
from serve.model import Embedder, Source, label
from serve.schemas import ApiError

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorAnswer} for status in (400, 404, 413, 415, 422, 503)
}


def build(source: Source, limits: Limits | None = None, *, threads: int | None = None) -> FastAPI:
    """The app: /v1/embeddings, /v1/models, /healthz, /readyz, and /docs.

    Args:
        source: where each request finds the model; started and stopped with the app.
        limits: the most that a request may carry.
        threads: that decode images, beside the one that runs the model.
    """
    engine = Engine(source, limits, threads=threads)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            engine.stop()

    app = FastAPI(title="OneThreshold", summary="Image embeddings with one threshold.", lifespan=lifespan)
    app.add_middleware(BodyLimit, request_bytes=engine.limits.request_bytes)
    _speak_in_one_shape(app)

    @app.get("/healthz")
    async def healthz() -> schemas.Health:
        """The process lives."""
        return schemas.Health()

    @app.get("/readyz", responses={503: ERRORS[503]})
    async def readyz() -> schemas.Ready:
        """A model is loaded."""
        model = engine.model()
        return schemas.Ready(
            model=label(model), name=model.name, version=model.version, dim=model.dim, image_size=model.image_size
        )

    @app.get("/v1/models")
    async def models() -> schemas.ModelList:
        """What is served; empty until a champion is loaded."""
        model = source.current
        return schemas.ModelList(data=[_card(model)] if model else [])

    @app.post("/v1/embeddings", response_model=schemas.EmbeddingsAnswer, responses=ERRORS)
    async def embeddings(wanted: schemas.EmbeddingsRequest) -> Response:
        """Embeds one image or a list of them."""
        model = engine.model(wanted.model)
        _check(wanted, model)
        items = [(f"input[{index}]", item) for index, item in enumerate(wanted.input)]
        embeddings_BD = await engine.embed(model, items)
        [body] = await engine.in_threads(lambda rows: post(model, rows, wanted.encoding_format), [embeddings_BD])
        return Response(body, media_type="application/json")

    return app


def post(model: Embedder, embeddings_BD: npt.NDArray[np.float32], encoding: str) -> bytes:
    """The answer's JSON; base64 is of little-endian float32."""
    rows: Sequence[list[float] | str]
    if encoding == "base64":
        rows = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in embeddings_BD]
    else:
        rows = embeddings_BD.tolist()
    data = [schemas.Embedding(index=index, embedding=row) for index, row in enumerate(rows)]
    return schemas.EmbeddingsAnswer(data=data, model=label(model)).model_dump_json().encode()


def _check(wanted: schemas.EmbeddingsRequest, model: Embedder) -> None:
    if wanted.dimensions not in (None, model.dim):
        message = f"dimensions: {wanted.dimensions} is not offered; {label(model)} has {model.dim}"
        raise ApiError(400, message, param="dimensions", code="dimensions_not_offered")


def _card(model: Embedder) -> schemas.ModelCard:
    return schemas.ModelCard(
        id=model.name, created=model.created, version=model.version, dim=model.dim, image_size=model.image_size
    )


def _speak_in_one_shape(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return schemas.error_response(error)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return schemas.error_response(ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return schemas.error_response(_explained(request, error))

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> Response:
        return schemas.error_response(ApiError(500, "the server failed; its log says why"))


def _explained(request: Request, error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['ctx']['error']}", code="invalid_json")
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not (media.startswith("application/") and media.endswith("json")):
        message = f"the Content-Type is {media[:100] or 'not given'}; valid: application/json"
        return ApiError(415, message, code="unsupported_media_type")
    path = [part for part in first["loc"] if part != "body"]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".") or None
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(422, f"{param}: {message}" if param else message, param=param, code="invalid_request")

"""The HTTP API as a FastAPI app; what it serves comes from a `Source`, so the same app runs with any model."""

import asyncio
import base64
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from PIL import Image
from starlette.exceptions import HTTPException

from dml.data.images import ImageError, probe
from dml.names import unknown
from serve import schemas
from serve.limits import BodyLimit, Limits
from serve.model import Embedder, Source, label
from serve.schemas import ApiError

Result = TypeVar("Result")
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
    limits = limits or Limits()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with (
            ThreadPoolExecutor(threads or os.cpu_count(), "decode") as app.state.decoding,
            ThreadPoolExecutor(1, "embed") as app.state.embedding,
        ):
            source.start()
            yield
            source.stop()

    app = FastAPI(title="OneThreshold", summary="Image embeddings with one threshold.", lifespan=lifespan)
    app.add_middleware(BodyLimit, request_bytes=limits.request_bytes)
    _speak_in_one_shape(app)

    @app.get("/healthz")
    async def healthz() -> schemas.Health:
        """The process lives."""
        return schemas.Health()

    @app.get("/readyz", responses={503: ERRORS[503]})
    async def readyz() -> schemas.Ready:
        """A model is loaded."""
        model = _loaded(source)
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
        model = _loaded(source)  # once: a change-over in mid-request does not mix two models
        _check(wanted, model, limits)
        decoding, embedding = app.state.decoding, app.state.embedding
        inputs = await _all(decoding, lambda item: pre(model, item[0], item[1], limits), enumerate(wanted.input))
        [embeddings_BD] = await _all(embedding, model.embed, [inputs])
        [body] = await _all(decoding, lambda rows: post(model, rows, wanted.encoding_format), [embeddings_BD])
        return Response(body, media_type="application/json")

    return app


def pre(model: Embedder, index: int, text: str, limits: Limits) -> torch.Tensor:
    """One item of a request's input as the tensor that the model takes.

    Raises:
        ApiError: no image, or one beyond the limits; nothing is decoded before these are checked.
    """
    param = f"input[{index}]"
    data = schemas.image_bytes(text, param, most=limits.image_bytes)
    try:
        width, height = probe(data)
        if width * height > limits.pixels:
            size = f"{width} x {height} pixels"
            message = f"{param} has {size}; at most {limits.pixels:,} are allowed"
            raise ApiError(413, message, param=param, code="too_many_pixels")
        if max(width, height) > limits.aspect * min(width, height):
            message = f"{param} is {width} x {height}; its sides may differ by a factor of {limits.aspect} at most"
            raise ApiError(422, message, param=param, code="image_too_elongated")
        return model.decode(data)
    except ImageError as error:
        if isinstance(error.__cause__, Image.DecompressionBombError):  # so many that Pillow gives no size
            message = f"{param} has far more than the {limits.pixels:,} pixels that are allowed"
            raise ApiError(413, message, param=param, code="too_many_pixels") from error
        raise ApiError(422, f"{param} is unreadable: {error}", param=param, code="unreadable_image") from error


def post(model: Embedder, embeddings_BD: npt.NDArray[np.float32], encoding: str) -> bytes:
    """The answer's JSON; base64 is of little-endian float32."""
    rows: Sequence[list[float] | str]
    if encoding == "base64":
        rows = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in embeddings_BD]
    else:
        rows = embeddings_BD.tolist()
    data = [schemas.Embedding(index=index, embedding=row) for index, row in enumerate(rows)]
    return schemas.EmbeddingsAnswer(data=data, model=label(model)).model_dump_json().encode()


def _loaded(source: Source) -> Embedder:
    model, trouble = source.current, source.trouble
    if model is not None:
        return model
    if trouble is not None:
        raise ApiError(503, f"no champion yet: {trouble}; the server's log says more", code="no_champion")
    message = (
        "no champion yet: `python -m tune.search` trains and registers one, and it is then served without a restart"
    )
    raise ApiError(503, message, code="no_champion")


def _check(wanted: schemas.EmbeddingsRequest, model: Embedder, limits: Limits) -> None:
    served = [model.name, label(model)]
    if wanted.model is not None and wanted.model not in served:
        message = unknown("model", wanted.model[:100], served)
        raise ApiError(404, message, param="model", code="model_not_found")
    if wanted.dimensions not in (None, model.dim):
        message = f"dimensions: {wanted.dimensions} is not offered; {label(model)} has {model.dim}"
        raise ApiError(400, message, param="dimensions", code="dimensions_not_offered")
    if len(wanted.input) > limits.images:
        message = f"input: {len(wanted.input)} images; at most {limits.images} a request are allowed"
        raise ApiError(413, message, param="input", code="too_many_images")


def _card(model: Embedder) -> schemas.ModelCard:
    return schemas.ModelCard(
        id=model.name, created=model.created, version=model.version, dim=model.dim, image_size=model.image_size
    )


async def _all(executor: Executor, function: Callable[[Any], Result], items: Any) -> list[Result]:
    """The function of every item, in threads; the first error drops what has not begun."""
    loop = asyncio.get_running_loop()
    futures = [loop.run_in_executor(executor, function, item) for item in items]
    try:
        return await asyncio.gather(*futures)
    finally:
        for future in futures:
            future.cancel()


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

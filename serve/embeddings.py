"""POST /v1/embeddings: images to embeddings, in the shape of the OpenAI API or as one array."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request, Response

from serve import bodies, schemas
from serve.engine import Engine
from serve.model import Embedder, label
from serve.schemas import ApiError

NPY = "application/x-npy"
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": schemas.EmbeddingsAnswer,
        "content": {NPY: {"schema": {"type": "string", "format": "binary"}}},
        "description": f"Embeddings in the order of the images. With `Accept: {NPY}` a NumPy file, float32 (B, D).",
    },
    **schemas.errors(400, 404, 413, 415, 422),
}


def routes(engine: Engine) -> APIRouter:
    """The route, answered by an engine."""
    router = APIRouter()

    @router.post(
        "/v1/embeddings",
        responses=_ANSWERS,
        openapi_extra=bodies.documented(schemas.EmbeddingsRequest, files=("input",), image="input"),
    )
    async def embeddings(request: Request) -> Response:
        """Embeds one image or many: JSON with data URIs or base64, a form with files, or one raw image."""
        schema = schemas.EmbeddingsRequest
        wanted = await bodies.read(request, schema, engine.limits, files=("input",), image="input")
        model = engine.model(wanted.model)
        _check(wanted, model)
        items = [(f"input[{index}]", item) for index, item in enumerate(wanted.input)]
        embeddings_BD = await engine.embed(model, items)
        if NPY in request.headers.get("accept", ""):
            return Response(_npy(embeddings_BD), media_type=NPY)
        [body] = await engine.in_threads(lambda rows: post(model, rows, wanted.encoding_format), [embeddings_BD])
        return Response(body, media_type="application/json")

    return router


def post(model: Embedder, embeddings_BD: npt.NDArray[np.float32], encoding: str) -> bytes:
    """The answer's JSON; base64 is of little-endian float32."""
    rows: Sequence[list[float] | str]
    if encoding == "base64":
        rows = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in embeddings_BD]
    else:
        rows = embeddings_BD.tolist()
    data = [schemas.Embedding(index=index, embedding=row) for index, row in enumerate(rows)]
    return schemas.EmbeddingsAnswer(data=data, model=label(model)).model_dump_json().encode()


def _npy(embeddings_BD: npt.NDArray[np.float32]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, embeddings_BD.astype("<f4", copy=False), allow_pickle=False)
    return stream.getvalue()


def _check(wanted: schemas.EmbeddingsRequest, model: Embedder) -> None:
    if wanted.dimensions not in (None, model.dim):
        message = f"dimensions: {wanted.dimensions} is not offered; {label(model)} has {model.dim}"
        raise ApiError(400, message, param="dimensions", code="dimensions_not_offered")

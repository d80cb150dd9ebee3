"""POST /v1/verify: two images or embeddings, and whether their distance lies within an operating point."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from dml.metrics.distance_histograms import EDGES
from serve import bodies, schemas
from serve.calibration import FARTHEST, decide
from serve.engine import Engine
from serve.model import label
from serve.schemas import ApiError, ImageOrEmbedding, OperatingPointAnswer


class VerifyRequest(schemas.KnownFields):
    """Two items, each an image or an embedding, and what decides; the middle operating point where nothing is said."""

    a: ImageOrEmbedding
    """The first: a data URI, bare base64, or the numbers of an embedding. URLs are not fetched."""
    b: ImageOrEmbedding
    """The second."""
    far: float | None = Field(None, examples=[0.01])
    """The false accept rate of one of the operating points that GET /v1/calibration lists."""
    threshold: float | None = None
    """In place of far: a Euclidean distance, 0 to 2."""
    model: str | None = None
    """The model that GET /v1/models lists, with or without its version; unset, whatever is served."""


class Verification(BaseModel):
    """Whether two items match."""

    object: Literal["verification"] = "verification"
    match: bool = Field(description="distance <= threshold")
    distance: float = Field(description="Euclidean, between unit vectors: 0 to 2.")
    similarity: float = Field(description="Cosine, -1 to 1: 1 - distance^2 / 2.")
    threshold: float = Field(description="A Euclidean distance.")
    operating_point: OperatingPointAnswer | None = Field(description="null for a threshold of the request's own.")
    calibration: str | None = Field(description="The id of the calibration in use.", examples=["0f3a9c1e77b2"])
    model: str = Field(examples=["onethreshold@3"])


class Histograms(BaseModel):
    """Pairs by Euclidean distance, in bins that hold their far edge."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    edges: list[float]
    """The edges of the bins, one more than these are."""
    positives: list[int]
    """Pairs of one class in each bin."""
    negatives: list[int]
    """Pairs of two classes in each bin."""


class CalibrationAnswer(BaseModel):
    """What verify and search decide by."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    object: Literal["calibration"] = "calibration"
    id: str
    """Every answer that it decides carries it."""
    created: int
    """When it was made, in seconds since 1970; 0 for the one that the model was registered with."""
    source: str
    """What it was made from; "registered" for the one that the model was registered with."""
    operating_points: list[OperatingPointAnswer]
    """Ascending by FAR target."""
    default_far: float
    """The FAR target of the operating point that decides when a request names none."""
    histograms: Histograms | None
    """The pairs that it was made from; null where they were not kept."""
    model: str = Field(examples=["onethreshold@3"])


def routes(engine: Engine) -> APIRouter:
    """The routes, answered by an engine."""
    router = APIRouter()
    files = ("a", "b")

    @router.post(
        "/v1/verify",
        responses=schemas.errors(400, 404, 413, 415, 422),
        openapi_extra=bodies.documented(VerifyRequest, files=files),
    )
    async def verify(request: Request) -> Verification:
        """Compares two items: JSON with data URIs, base64 or embeddings, or a form with two files."""
        wanted = await bodies.read(request, VerifyRequest, engine.limits, files=files)
        model = engine.model(wanted.model)
        threshold, point = decide(model, wanted.far, wanted.threshold)
        a_D, b_D = await engine.embed(model, [("a", wanted.a), ("b", wanted.b)])
        distance = between(a_D, b_D)
        engine.live.see(model, distance)
        return Verification(
            match=distance <= threshold,
            distance=distance,
            similarity=1 - distance**2 / 2,
            threshold=threshold,
            operating_point=None if point is None else OperatingPointAnswer.of(point),
            calibration=model.calibration.id if model.calibration else None,
            model=label(model),
        )

    @router.get("/v1/calibration", responses=schemas.errors(404))
    async def calibration() -> CalibrationAnswer:
        """The operating points in use, with the pairs that they were calibrated on."""
        model = engine.model()
        used = model.calibration
        if used is None:
            message = f"{label(model)} has no operating points; python -m serve.calibrate makes them"
            raise ApiError(404, message, code="not_calibrated")
        return CalibrationAnswer(
            id=used.id,
            created=used.created,
            source=used.source,
            operating_points=[OperatingPointAnswer.of(point) for point in used.points],
            default_far=used.middle.far_target,
            histograms=Histograms(edges=EDGES.tolist(), **used.histograms.as_dict()) if used.histograms else None,
            model=label(model),
        )

    return router


def between(a_D: npt.NDArray[Any], b_D: npt.NDArray[Any]) -> float:
    """The Euclidean distance of two vectors of unit norm, each normalised once more in float64; 0 to 2."""
    a, b = (row.astype(np.float64) / np.linalg.norm(row.astype(np.float64)) for row in (a_D, b_D))
    return min(float(np.linalg.norm(a - b)), FARTHEST)

"""GET /v1/drift: the distances that a replica measured lately, beside those that its thresholds were set on."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from dml.metrics.distance_histograms import EDGES
from dml.metrics.drift import ENOUGH, Level
from serve import schemas
from serve.engine import Engine
from serve.live import WINDOW
from serve.model import label


class DriftAnswer(BaseModel):
    """Live distances of POST /v1/verify against the calibration in use."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    object: Literal["drift"] = "drift"
    scope: Literal["replica"] = "replica"
    """The replica that answers: each counts what it measured itself."""
    level: Level | None
    """What the divergence beyond noise means; null for too few distances, or a calibration without histograms."""
    divergence: float | None
    """Jensen-Shannon, in bits, 0 to 1, from the nearest mixture of the calibration's positives and negatives."""
    noise: float | None
    """About what the divergence is without any drift, as so few distances were counted."""
    share: float | None
    """The share of positives in that mixture: how many of the pairs asked about seem to be the same."""
    distances: int
    """Distances in the histogram."""
    seen: int
    """Distances since the model was loaded, those forgotten included."""
    enough: int = ENOUGH
    """Distances from which on there is a figure."""
    window: int = WINDOW
    """Distances after which the oldest are forgotten."""
    edges: list[float]
    """The edges of the histograms' bins."""
    live: list[int]
    """Distances in each bin."""
    positives: list[int] | None
    """The calibration's pairs of one class in each bin."""
    negatives: list[int] | None
    """The calibration's pairs of two classes in each bin."""
    calibration: str | None
    """The id of the calibration in use."""
    model: str = Field(examples=["onethreshold@3"])


def routes(engine: Engine) -> APIRouter:
    """The route, answered by an engine."""
    router = APIRouter()

    @router.get("/v1/drift", responses=schemas.errors())
    async def drift() -> DriftAnswer:
        """Whether live distances still have the shape that the thresholds were set on."""
        model, live = engine.model(), engine.live
        counts_B = live.counts_of(model)
        found, used = live.against(model), model.calibration
        pairs = used.histograms if used else None
        return DriftAnswer(
            level=found.level if found else None,
            divergence=found.divergence if found else None,
            noise=found.noise if found else None,
            share=found.share if found else None,
            distances=int(counts_B.sum()),
            seen=live.seen if counts_B.any() else 0,
            edges=EDGES.tolist(),
            live=counts_B.tolist(),
            positives=list(pairs.positives) if pairs else None,
            negatives=list(pairs.negatives) if pairs else None,
            calibration=used.id if used else None,
            model=label(model),
        )

    return router

"""GET /v1/models: what is served, how it did on test classes, and the thresholds that were calibrated for it."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from dml.metrics.operating_points import OperatingPoint
from serve import schemas
from serve.engine import Engine
from serve.model import Embedder


class ModelCard(BaseModel):
    """A model that is served."""

    id: str = Field(examples=["onethreshold"])
    object: Literal["model"] = "model"
    created: int = Field(description="When its weights were written, in seconds since 1970.")
    owned_by: str = "onethreshold"
    version: str = Field(examples=["3"])
    alias: str | None = Field(description="Of the registry, when one is followed.", examples=["champion"])
    dim: int = Field(description="D, the dimension of its embeddings.")
    image_size: int = Field(description="Height and width that images are resized to, in pixels.")
    operating_points: list[OperatingPoint] = Field(description="FAR targets and their thresholds, with intervals.")
    calibration: str | None = Field(description="Id of the calibration that these points come from.")
    metrics: dict[str, float] = Field(description="Figures on test classes: test/opis, test/recall@1, ...")


class ModelList(BaseModel):
    """What is served; empty until a champion is loaded."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def routes(engine: Engine) -> APIRouter:
    """The route, answered by an engine."""
    router = APIRouter()

    @router.get("/v1/models", responses=schemas.errors())
    async def models() -> ModelList:
        """What is served; empty until a champion is loaded."""
        model = engine.source.current
        return ModelList(data=[_card(model)] if model else [])

    return router


def _card(model: Embedder) -> ModelCard:
    return ModelCard(
        id=model.name,
        created=model.created,
        version=model.version,
        alias=model.alias,
        dim=model.dim,
        image_size=model.image_size,
        operating_points=list(model.calibration.points) if model.calibration else [],
        calibration=model.calibration.id if model.calibration else None,
        metrics=dict(model.metrics),
    )

"""Answers of the service as types; fields that a newer service adds are passed over."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold that was calibrated to a false accept rate (FAR), and what it did to the calibration pairs."""

    far_target: float
    """The false accept rate that was asked for."""
    threshold: float
    """A Euclidean distance, 0 to 2: what is at it or nearer matches."""
    far: float
    """Accepted negatives / negatives."""
    frr: float
    """Rejected positives / positives."""
    far_interval: tuple[float, float] | None = None
    """95% interval of the FAR on other classes; None where there were too few."""
    frr_interval: tuple[float, float] | None = None
    """95% interval of the FRR on other classes; None where there were too few."""


@dataclass(frozen=True)
class Verification:
    """Whether two items match."""

    match: bool
    """distance <= threshold."""
    distance: float
    """Euclidean, 0 to 2."""
    similarity: float
    """Cosine, -1 to 1."""
    threshold: float
    """A Euclidean distance."""
    operating_point: OperatingPoint | None
    """None for a threshold of one's own."""
    calibration: str | None
    """The id of the calibration in use."""
    model: str
    """Name and version, e.g. onethreshold@3."""


@dataclass(frozen=True)
class Hit:
    """An item of a gallery that was found."""

    id: str
    distance: float
    """Euclidean, 0 to 2."""
    similarity: float
    """Cosine, -1 to 1."""
    match: bool | None
    """Whether it lies within the threshold; None when nothing decides."""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchResult:
    """The nearest items of a gallery, nearest first."""

    data: tuple[Hit, ...]
    gallery: str
    model: str
    """Name and version, e.g. onethreshold@3."""
    threshold: float | None = None
    """A Euclidean distance."""
    operating_point: OperatingPoint | None = None
    """None for a threshold of one's own."""
    calibration: str | None = None
    """The id of the calibration in use."""


@dataclass(frozen=True)
class Gallery:
    """A gallery."""

    name: str
    items: int = 0
    """How many it holds."""
    model: str | None = None
    """The model that embedded them, e.g. onethreshold@3; None while it is empty."""
    keep_images: bool = False
    """Whether images are kept beside embeddings."""
    details: dict[str, Any] = field(default_factory=dict)
    """The whole answer."""


@dataclass(frozen=True)
class Model:
    """A model that is served."""

    id: str
    version: str
    dim: int
    """D, the dimension of its embeddings."""
    image_size: int
    """Pixels."""
    created: int = 0
    """Seconds since 1970."""
    alias: str | None = None
    calibration: str | None = None
    """The id of the calibration in use."""
    operating_points: tuple[OperatingPoint, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    """The whole answer."""


@dataclass(frozen=True)
class Ready:
    """The model that answers now."""

    model: str
    """Name and version, e.g. onethreshold@3."""
    dim: int
    """D, the dimension of its embeddings."""
    image_size: int
    """Pixels."""


def verification(read: Mapping[str, Any]) -> Verification:
    """From the JSON of POST /v1/verify."""
    return _known(Verification, read, operating_point=_point(read.get("operating_point")))


def search_result(read: Mapping[str, Any]) -> SearchResult:
    """From the JSON of POST /v1/search."""
    hits = tuple(_known(Hit, {"match": None, **hit}, metadata=hit.get("metadata") or {}) for hit in read["data"])
    return _known(SearchResult, read, data=hits, operating_point=_point(read.get("operating_point")))


def gallery(read: Mapping[str, Any]) -> Gallery:
    """From the JSON of /v1/galleries/NAME."""
    return _known(Gallery, read, details=dict(read))


def model(read: Mapping[str, Any]) -> Model:
    """From a row of GET /v1/models."""
    points = (_point(point) for point in read.get("operating_points") or ())
    return _known(Model, read, operating_points=tuple(p for p in points if p), details=dict(read))


def ready(read: Mapping[str, Any]) -> Ready:
    """From the JSON of GET /readyz."""
    return _known(Ready, read)


def _point(read: Mapping[str, Any] | None) -> OperatingPoint | None:
    if read is None:
        return None
    ends = {name: tuple(read[name]) if read.get(name) else None for name in ("far_interval", "frr_interval")}
    return _known(OperatingPoint, read, **ends)


def _known(kind: type[Answer], read: Mapping[str, Any], **made: Any) -> Answer:
    names = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in read.items() if name in names} | made)

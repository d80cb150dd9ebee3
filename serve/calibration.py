"""The operating points that decide same or not, with the calibration that they come from."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import registry
from dml.metrics.distance_histograms import DistanceHistograms
from dml.metrics.operating_points import OperatingPoint, to_distance, to_similarity
from serve.schemas import ApiError

if TYPE_CHECKING:
    from serve.model import Embedder

FARTHEST = 2.0
"""The Euclidean distance of opposite unit vectors."""
REGISTERED = "registered"
"""The source of a calibration that a model was registered with."""


@dataclass(frozen=True)
class Calibration:
    """Operating points, ascending by FAR target, their thresholds as Euclidean distances.

    Attributes:
        id: twelve hexadecimal digits of the points' SHA-256; answers carry it.
        points: thresholds and what they did to the pairs that they were calibrated on.
        histograms: those pairs by distance; None where they were not kept.
        source: what they were calibrated on, in words.
        created: when, in seconds since 1970; 0 for those that a model was registered with.
    """

    id: str
    points: tuple[OperatingPoint, ...]
    histograms: DistanceHistograms | None = None
    source: str = REGISTERED
    created: int = 0

    @classmethod
    def of(
        cls,
        points: Sequence[Mapping[str, Any]],
        histograms: DistanceHistograms | None = None,
        source: str = REGISTERED,
        created: int = 0,
    ) -> "Calibration":
        """From JSON-like operating points, as `cluster.registry.register` stores them, in either distance.

        Raises:
            ValueError: there are none.
        """
        if not points:
            raise ValueError("a calibration has at least one operating point")
        read = sorted((OperatingPoint(**point) for point in points), key=lambda point: point.far_target)
        text = json.dumps([asdict(point) for point in read], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        return cls(digest, tuple(_euclidean(point) for point in read), histograms, source, created)

    @classmethod
    def read(cls, path: Path) -> "Calibration | None":
        """From an operating_points.json and the histograms in the evaluation.json beside it; None without points."""
        points = json.loads(path.read_text()) if path.is_file() else []
        if not points:
            return None
        beside = path.with_name(registry.EVALUATION)
        evaluation = json.loads(beside.read_text()) if beside.is_file() else {}
        counts = evaluation.get("distances")
        return cls.of(points, DistanceHistograms.of_dict(counts) if counts else None)

    @classmethod
    def of_text(cls, text: str) -> "Calibration":
        """From what `text` gave.

        Raises:
            ValueError: it is no calibration.
        """
        try:
            read = json.loads(text)
            counts = read["histograms"]
            histograms = None if counts is None else DistanceHistograms.of_dict(counts)
            return cls.of(read["points"], histograms, str(read["source"]), int(read["created"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"no calibration: {type(error).__name__}: {error}") from error

    @property
    def text(self) -> str:
        """JSON, for `of_text`."""
        stored = {
            "points": [asdict(point) for point in self.points],
            "histograms": None if self.histograms is None else self.histograms.as_dict(),
            "source": self.source,
            "created": self.created,
        }
        return json.dumps(stored, separators=(",", ":"))

    @property
    def middle(self) -> OperatingPoint:
        """What decides when a request names neither a FAR nor a threshold; of two middle ones, the stricter."""
        return self.points[(len(self.points) - 1) // 2]

    def at(self, far: float) -> OperatingPoint:
        """The operating point with this FAR target.

        Raises:
            ApiError: none was calibrated for it.
        """
        for point in self.points:
            if math.isclose(point.far_target, far, rel_tol=1e-6):
                return point
        valid = ", ".join(f"{point.far_target:g}" for point in self.points)
        message = f"far: {far:g} was not calibrated; valid: {valid}, or give a threshold"
        raise ApiError(422, message, param="far", code="far_not_calibrated")


def decide(model: "Embedder", far: float | None, threshold: float | None) -> tuple[float, OperatingPoint | None]:
    """The threshold that a request is decided by, and the operating point that it comes from.

    Args:
        model: that answers the request.
        far: the FAR target of one of its operating points.
        threshold: a Euclidean distance in [0, 2], in place of an operating point.

    Returns:
        A Euclidean distance: what is at it or nearer matches. With neither `far` nor `threshold`, that of the middle
        operating point. None beside a threshold that was given.

    Raises:
        ApiError: both are given, or a threshold that is no distance, or a FAR that was not calibrated; or neither, and
            the model has no operating points.
    """
    if threshold is not None:
        if far is not None:
            raise ApiError(422, "far and threshold: give one of them", param="threshold", code="far_and_threshold")
        if not 0 <= threshold <= FARTHEST:
            message = f"threshold: {threshold:g} is no distance of unit vectors; valid: 0 to {FARTHEST:g}"
            raise ApiError(422, message, param="threshold", code="not_a_distance")
        return threshold, None
    if model.calibration is None:
        served = f"{model.name}@{model.version}"
        message = f"{served} has no operating points: give a threshold (python -m serve.calibrate sets points)"
        raise ApiError(422, message, param=None if far is None else "far", code="not_calibrated")
    point = model.calibration.middle if far is None else model.calibration.at(far)
    return point.threshold, point


def _euclidean(point: OperatingPoint) -> OperatingPoint:
    if point.distance == "euclidean":
        return point
    threshold = float(to_distance(to_similarity(point.threshold, point.distance), "euclidean"))
    return replace(point, threshold=threshold, distance="euclidean")

"""The operating points that decide same or not, with the id of the calibration that they come from."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dml.metrics.operating_points import OperatingPoint
from serve.schemas import ApiError


@dataclass(frozen=True)
class Calibration:
    """Operating points, ascending by FAR target.

    Attributes:
        id: twelve hexadecimal digits of the points' SHA-256; answers carry it.
        points: thresholds and what they did to the pairs that they were calibrated on.
    """

    id: str
    points: tuple[OperatingPoint, ...]

    @classmethod
    def of(cls, points: Sequence[Mapping[str, Any]]) -> "Calibration":
        """From JSON-like operating points, as `cluster.registry.register` stores them."""
        read = sorted((OperatingPoint(**point) for point in points), key=lambda point: point.far_target)
        text = json.dumps([asdict(point) for point in read], sort_keys=True)
        return cls(hashlib.sha256(text.encode()).hexdigest()[:12], tuple(read))

    @classmethod
    def read(cls, path: Path) -> "Calibration | None":
        """From an operating_points.json; None when there is none, or none in it."""
        points = json.loads(path.read_text()) if path.is_file() else []
        return cls.of(points) if points else None

    def at(self, far: float) -> OperatingPoint:
        """The operating point with this FAR target.

        Raises:
            ApiError: none was calibrated for it.
        """
        for point in self.points:
            if abs(point.far_target - far) <= 1e-9:
                return point
        valid = ", ".join(f"{point.far_target:g}" for point in self.points)
        message = f"far: {far:g} was not calibrated; valid: {valid}, or give a threshold"
        raise ApiError(422, message, param="far", code="far_not_calibrated")

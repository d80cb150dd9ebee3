"""A dummy model whose distances are known, with a calibration made from pairs whose shapes are known."""

from dataclasses import asdict

import numpy as np

from dml.metrics.distance_histograms import BINS, DistanceHistograms, bins_of
from dml.metrics.operating_points import OperatingPoint
from serve.calibration import Calibration
from tests.serve.pictures import MeanColour


def distances(seed: int, count: int, share: float, shift: float = 0.0) -> np.ndarray:
    """Distances of positives around 0.45 and of negatives around 1.25, as encoders have them."""
    draws = np.random.default_rng(seed)
    positives = draws.normal(0.45, 0.16, round(count * share))
    negatives = draws.normal(1.25, 0.14, count - len(positives))
    return np.clip(np.concatenate([positives, negatives]) + shift, 0, 2)


def histograms(positives: int = 4000, negatives: int = 60_000) -> DistanceHistograms:
    counts = (
        np.bincount(bins_of(distances(seed, count, share)), minlength=BINS)
        for seed, count, share in ((1, positives, 1.0), (2, negatives, 0.0))
    )
    return DistanceHistograms(*(tuple(each.tolist()) for each in counts))


def calibration(with_histograms: bool = True, source: str = "registered", created: int = 0) -> Calibration:
    """Operating points at the quantiles of those negatives."""
    near, far = distances(1, 4000, 1.0), np.sort(distances(2, 60_000, 0.0))
    points = []
    for target in (0.1, 0.01, 0.001):
        threshold = float(far[int(target * len(far)) - 1])
        frr = float((near > threshold).mean())
        ends = {"far_interval": (target / 2, target * 2), "frr_interval": (frr / 2, min(1.0, frr * 2))}
        points.append(asdict(OperatingPoint(target, threshold, target, frr, len(far), len(near), **ends)))
    return Calibration.of(points, histograms() if with_histograms else None, source, created)


def colour(used: Calibration | None) -> MeanColour:
    """The mean colour of an image, decided by a calibration."""
    model = MeanColour()
    model.calibration = used
    return model

"""How far the distances of a running service have moved from those of its calibration pairs.

The share of positives in traffic is not that of the calibration pairs, and is not known. So the live distances are
compared with the nearest mixture of the calibration's positives and negatives: traffic with more or fewer pairs of one
class is no drift, distances of a shape that no share explains are.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from dml.metrics.distance_histograms import BINS, DistanceHistograms
from dml.metrics.inputs import Counts, Floats

Level: TypeAlias = Literal["stable", "watch", "drifted"]

COARSE = 20
"""Bins that distances are compared in: fewer than are drawn, since each adds to the noise."""
ENOUGH = 200
"""Live distances from which on a figure is given."""
WATCH, DRIFTED = 0.02, 0.05
"""Bits of divergence beyond noise. The rules of thumb of the population stability index, 0.1 and 0.25 (Siddiqi, Credit
Risk Scorecards, 2006), in bits of this divergence, which is an eighth of it for small changes: 0.018 and 0.045."""


@dataclass(frozen=True)
class Drift:
    """Live distances against calibration pairs."""

    divergence: float
    """Jensen-Shannon divergence from the nearest mixture, in bits: 0 for the same shape, 1 for shapes that do not
    overlap."""
    noise: float
    """About what it is without any drift, as so few distances were counted."""
    share: float
    """The share of positives in the nearest mixture, 0 to 1."""

    @property
    def level(self) -> Level:
        """stable, watch or drifted: the divergence beyond noise, below WATCH, below DRIFTED, or above."""
        beyond = self.divergence - self.noise
        return "stable" if beyond < WATCH else "watch" if beyond < DRIFTED else "drifted"


def drift(live_B: Counts, calibration: DistanceHistograms) -> Drift | None:
    """The divergence between live distances and the nearest mixture of the calibration's positives and negatives.

    min over w of JS(live, w positives + (1 - w) negatives), with JS of Lin, "Divergence Measures Based on the Shannon
    Entropy", IEEE Transactions on Information Theory 37(1), 1991; it is convex in w. What it cannot see: a shift from
    the one shape towards the other, which looks like another share; watch the share beside it.

    Args:
        live_B: (BINS,) counts on the bins of `dml.metrics.distance_histograms`.
        calibration: of the model that the live distances are of.

    Returns:
        None for fewer than ENOUGH live distances, or a calibration without pairs of both kinds.
    """
    live, positives, negatives = (
        np.asarray(counts, dtype=np.float64).reshape(COARSE, BINS // COARSE).sum(axis=1)
        for counts in (live_B, calibration.positives, calibration.negatives)
    )
    if live.sum() < ENOUGH or not positives.sum() or not negatives.sum():
        return None
    p, a, b = (counts / counts.sum() for counts in (live, positives, negatives))
    share = _nearest(p, a, b)
    variance = 1 / live.sum() + share / positives.sum() + (1 - share) / negatives.sum()
    # JS is an eighth of chi-square for small differences; one degree of freedom goes to the sum, one to the share.
    freedom = max(int(((live + positives + negatives) > 0).sum()) - 2, 0)
    noise = min(freedom * float(variance) / (8 * math.log(2)), 1.0)
    return Drift(divergence=jensen_shannon(p, share * a + (1 - share) * b), noise=noise, share=share)


def jensen_shannon(p: Floats, q: Floats) -> float:
    """Jensen-Shannon divergence of two distributions over the same bins, in bits, 0 to 1 (Lin 1991)."""
    middle = (p + q) / 2
    return max(0.0, (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2)


def _relative_entropy(p: Floats, q: Floats) -> float:
    some = p > 0
    return float((p[some] * np.log2(p[some] / q[some])).sum())


def _nearest(p: Floats, a: Floats, b: Floats) -> float:
    """The w of the mixture w a + (1 - w) b that is nearest to p, to 1e-7: by thirds, since the divergence is convex."""
    low, high = 0.0, 1.0
    while high - low > 1e-7:
        left, right = low + (high - low) / 3, high - (high - low) / 3
        if jensen_shannon(p, left * a + (1 - left) * b) <= jensen_shannon(p, right * a + (1 - right) * b):
            high = right
        else:
            low = left
    return (low + high) / 2

"""Operating points: the distance threshold at which the global false accept rate meets a target."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dml.gather import Group
from dml.metrics.class_rates import class_rates
from dml.metrics.inputs import Array, Counts
from dml.metrics.intervals import Interval
from dml.metrics.pair_counts import PairGrid
from dml.metrics.pair_distances import (
    DISTANCES,
    Distance,
    PairDistances,
    accepting_similarity,
    check_distance,
    distances_of,
    to_distance,
    to_similarity,
)

__all__ = [
    "DISTANCES",
    "Distance",
    "OperatingPoint",
    "UnreachableFARError",
    "calibrate",
    "check_distance",
    "check_targets",
    "farthest_within",
    "operating_point",
    "to_distance",
    "to_similarity",
]


class UnreachableFARError(ValueError):
    """Too few negatives, or too many alike, for any threshold to have a FAR this small."""


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold and what it did to the pairs that it was calibrated on.

    `dataclasses.asdict` gives JSON, and `OperatingPoint(**read)` takes it back.
    """

    far_target: float
    """The false accept rate asked for."""
    threshold: float
    """Pairs at this distance or nearer are accepted."""
    far: float
    """Accepted negatives / negatives, at most far_target."""
    frr: float
    """Rejected positives / positives."""
    negatives: int
    """Pairs of two classes."""
    positives: int
    """Pairs of one class."""
    distance: Distance = "euclidean"
    """What the threshold is a distance in: "euclidean" or "cosine"."""
    far_interval: Interval | None = None
    """95% interval of the FAR that this threshold has on other classes of the same population."""
    frr_interval: Interval | None = None
    """95% interval of the FRR that this threshold has on other classes of the same population."""

    def __post_init__(self) -> None:
        check_distance(self.distance)
        for name in ("far_interval", "frr_interval"):
            ends = getattr(self, name)
            object.__setattr__(self, name, ends if ends is None else tuple(ends))  # JSON made a list of it


def calibrate(
    embeddings_ND: Array,
    labels_N: Array,
    *,
    far: Sequence[float] = (1e-1, 1e-2, 1e-3),
    gallery: tuple[Array, Array] | None = None,
    distance: Distance = "euclidean",
    group: Group | None = None,
) -> tuple[OperatingPoint, ...]:
    """Find, for each FAR target, the largest distance threshold that keeps to it on all pairs of these samples.

    A pair is accepted when its distance is at most the threshold; see `operating_point` for where it stands. The
    achieved FAR lies at or just below the target by construction. What may be promised is `far_interval`: in 95% of
    calibrations on as many classes of the same population, it holds the FAR that the threshold has on all of them.
    It is an interval over classes, not over pairs (`dml.metrics.intervals`): of one set with itself, over both classes
    of a negative; in query/gallery form over those of the queries, the gallery being as it is.

    Args:
        embeddings_ND: (N, D) floats, NumPy or torch; rows are normalised. The queries, where there is a gallery.
        labels_N: (N,) integers.
        far: targets, each between 0 and 1.
        gallery: embeddings (G, D) and labels (G,) that the rows are compared with, instead of one another.
        distance: "euclidean", sqrt(2 - 2 s) in [0, 2], or "cosine", 1 - s in [0, 2].
        group: ranks that share the work, each called with the same arrays; every rank gets the whole result.

    Returns:
        One operating point a target, in the order of the targets. An interval is None where there are too few classes.

    Raises:
        ValueError: bad input (see `dml.metrics.inputs`), or a target that is no rate.
        UnreachableFARError: a target that these negatives do not resolve.
    """
    check_distance(distance)
    check_targets(far)
    grid = PairGrid.of(embeddings_ND, labels_N, gallery)
    pairs = distances_of(grid, distance, group)
    points = [operating_point(pairs, target) for target in far]
    rates = class_rates(grid, [accepting_similarity(point.threshold, distance) for point in points], group)
    return tuple(
        replace(point, far_interval=rate.far_interval, frr_interval=rate.frr_interval)
        for point, rate in zip(points, rates, strict=True)
    )


def operating_point(pairs: PairDistances, far_target: float) -> OperatingPoint:
    """The largest threshold whose FAR is at most the target, without intervals.

    It is the distance of the farthest pair before the first negative that can no longer be accepted; negatives of equal
    distance are accepted together, so the achieved FAR may lie below the target. It stands on the far edge of that
    pair's cell, less than 1e-6 of similarity away, where rounding cannot push a tied pair across.

    Raises:
        ValueError: a target that is no rate.
        UnreachableFARError: even the nearest negatives exceed the target.
    """
    check_targets([far_target])
    reached = pairs.far_M[farthest_within(pairs.negatives_M, far_target)]
    at = int(pairs.far_M.searchsorted(reached, side="right")) - 1  # positives up to the next negative cost no FAR
    return OperatingPoint(
        far_target=float(far_target),
        threshold=float(pairs.distances_M[at]),
        far=float(pairs.far_M[at]),
        frr=float(pairs.frr_M[at]),
        negatives=pairs.negatives,
        positives=pairs.positives,
        distance=pairs.distance,
    )


def farthest_within(negatives_M: Counts, far: float) -> int:
    """Index of the last negatives that can be accepted, with all before them, at this FAR.

    Args:
        negatives_M: how many there are, nearest first.
        far: the bound, between 0 and 1.

    Raises:
        UnreachableFARError: even the nearest negatives exceed the bound; it names the smallest FAR that they resolve.
    """
    occupied = np.flatnonzero(negatives_M != 0)
    far_to = negatives_M[occupied].cumsum() / negatives_M.sum()
    reached = int(far_to.searchsorted(far, side="right"))
    if not reached:
        raise UnreachableFARError(
            f"FAR {far:g} cannot be reached: "
            f"{int(negatives_M.sum()):,} negative pairs resolve no FAR below {far_to[0]:.3g}"
        )
    return int(occupied[reached - 1])


def check_targets(far: Sequence[float]) -> None:
    """Raise ValueError for a FAR target that is not between 0 and 1."""
    for target in far:
        if not 0 < target < 1:
            raise ValueError(f"a FAR target must lie between 0 and 1, got {target:g}")

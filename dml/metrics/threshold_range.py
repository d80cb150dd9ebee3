"""The range of thresholds that curves are measured over: from FAR bounds, from FRR bounds, or given as distances."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from dml.gather import Group
from dml.metrics.inputs import Counts
from dml.metrics.operating_points import farthest_within
from dml.metrics.pair_counts import (
    CELLS,
    PairGrid,
    cell_edge,
    positives_histogram,
    similarity_histograms,
)
from dml.metrics.pair_distances import Distance, to_distance
from dml.metrics.pair_sample import sampled_negatives

Bounds: TypeAlias = tuple[float, float]
RangeFrom: TypeAlias = Literal["far", "frr", "distance"]

FAR_RANGE: Bounds = (0.01, 0.10)
"""The global false accept rates between which curves are measured where nothing else is said."""
SAMPLE = 10_000_000
"""Negative pairs that a FAR range is found from, where there are more."""
SAMPLE_AT_LEAST = 1000
"""Of these, so many must lie within the lower bound; else all negatives are looked at."""

_FARTHEST = 2.0


@dataclass(frozen=True)
class ThresholdRange:
    """What the ends of a range are made from."""

    made_from: RangeFrom
    bounds: Bounds
    """Lower and upper: rates, or distances."""

    @classmethod
    def chosen(cls, far: Bounds | None, frr: Bounds | None, distance: Bounds | None) -> "ThresholdRange":
        """The one range that is given, or FAR_RANGE.

        Raises:
            ValueError: more than one, or bounds not ascending within 0 and 1 (rates, ends left out) or 0 and 2.
        """
        given: dict[RangeFrom, Bounds | None] = {"far": far, "frr": frr, "distance": distance}
        named = [name for name, bounds in given.items() if bounds is not None]
        if len(named) > 1:
            raise ValueError(f"give one of far_range, frr_range and distance_range, got {' and '.join(named)}")
        made_from: RangeFrom = named[0] if named else "far"
        low, high = (float(bound) for bound in given[made_from] or FAR_RANGE)
        if made_from == "distance":
            if not 0 <= low < high <= _FARTHEST:
                raise ValueError(f"distance_range needs 0 <= low < high <= 2, got {low:g} and {high:g}")
        elif not 0 < low < high < 1:
            raise ValueError(f"{made_from}_range needs 0 < low < high < 1, got {low:g} and {high:g}")
        return cls(made_from, (low, high))

    def ends(self, grid: PairGrid, distance: Distance, group: Group | None = None) -> Bounds:
        """The smallest and the largest threshold, as distances.

        Raises:
            UnreachableFARError: too few negatives, or too many alike, for a FAR bound.
            ValueError: too few positives, or too many alike, for an FRR bound.
        """
        low, high = self.bounds
        if self.made_from == "distance":
            return self.bounds
        if self.made_from == "frr":
            positives = positives_histogram(grid, group)
            far, near = (cell_of_frr(positives, bound) for bound in self.bounds)
        else:
            exact = grid.negatives <= SAMPLE or low * SAMPLE < SAMPLE_AT_LEAST
            nearest_first = (
                similarity_histograms(grid, group)[1][::-1]
                if exact
                else sampled_negatives(grid, SAMPLE, far=high, group=group)
            )
            near, far = (CELLS - 1 - farthest_within(nearest_first, bound) for bound in self.bounds)
        ends = to_distance(np.array([cell_edge(near), cell_edge(far)]), distance)
        return float(ends[0]), float(ends[1])


def cell_of_frr(positives: Counts, frr: float) -> int:
    """The highest cell of similarity that holds a positive and keeps to this FRR when it and all above are accepted.

    Args:
        positives: a histogram of `dml.metrics.pair_counts`.
        frr: the bound, between 0 and 1.

    Raises:
        ValueError: rejecting the farthest positives alone exceeds the bound; it names the smallest FRR that they
            resolve.
    """
    occupied = np.flatnonzero(positives != 0)
    rejected = positives[occupied].cumsum()
    if rejected[0] > frr * rejected[-1]:
        raise ValueError(
            f"FRR {frr:g} cannot be told from 0: "
            f"{int(rejected[-1]):,} positive pairs resolve no FRR below {rejected[0] / rejected[-1]:.3g}"
        )
    return int(occupied[(rejected <= frr * rejected[-1]).sum()])

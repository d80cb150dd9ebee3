"""Positives and negatives counted in bins of distance: the shapes that a page draws and drift is measured against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dml.metrics.inputs import Counts, Floats
from dml.metrics.pair_distances import PairDistances, to_distance, to_similarity

BINS = 100
"""Bins of equal width over [0, 2], the Euclidean distances of unit vectors."""
EDGES: Floats = np.linspace(0.0, 2.0, BINS + 1)
"""(BINS + 1,) edges; a bin holds its far edge, so that counts up to a bin are those that its far edge accepts."""


@dataclass(frozen=True)
class DistanceHistograms:
    """Calibration pairs by Euclidean distance.

    `as_dict` gives JSON, and `of_dict` takes it back.
    """

    positives: tuple[int, ...]
    """(BINS,) pairs of one class."""
    negatives: tuple[int, ...]
    """(BINS,) pairs of two classes."""

    def __post_init__(self) -> None:
        for name in ("positives", "negatives"):
            counts = getattr(self, name)
            if len(counts) != BINS or any(type(count) is not int or count < 0 for count in counts):
                raise ValueError(f"{name}: a histogram has {BINS} counts, each 0 or more")

    @classmethod
    def of(cls, pairs: PairDistances) -> "DistanceHistograms":
        """The histograms of pairs that are counted by distance, Euclidean or cosine."""
        # Duplicates stand on the far edge of their cell, beyond a similarity of 1.
        similarity_M = np.minimum(to_similarity(pairs.distances_M, pairs.distance), 1.0)
        bins_M = bins_of(to_distance(similarity_M, "euclidean"))
        positives, negatives = (
            np.bincount(bins_M, weights=counts_M, minlength=BINS).astype(np.int64).tolist()
            for counts_M in (pairs.positives_M, pairs.negatives_M)
        )
        return cls(tuple(positives), tuple(negatives))

    @classmethod
    def of_dict(cls, read: Mapping[str, Sequence[int]]) -> "DistanceHistograms":
        """From what `as_dict` gave.

        Raises:
            ValueError: histograms of another form.
            KeyError: one of them is missing.
        """
        return cls(tuple(read["positives"]), tuple(read["negatives"]))

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON."""
        return {"positives": list(self.positives), "negatives": list(self.negatives)}


def bins_of(distances: Floats) -> Counts:
    """The bin of each Euclidean distance; what rounding moved out of [0, 2] lies in the first or the last."""
    return np.asarray(np.clip(EDGES[1:].searchsorted(distances, side="left"), 0, BINS - 1), dtype=np.int64)

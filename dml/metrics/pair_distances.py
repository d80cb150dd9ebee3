"""How many positives and negatives lie at each distance: what ROC curves and thresholds are read from."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from dml.gather import Group
from dml.metrics.inputs import Array, Counts, Floats, full_precision
from dml.metrics.pair_counts import PairGrid, cell_edge, cell_of, similarity_histograms
from dml.names import unknown

Distance: TypeAlias = Literal["euclidean", "cosine"]

DISTANCES: tuple[Distance, ...] = ("euclidean", "cosine")


@dataclass(frozen=True, eq=False)
class PairDistances:
    """Pairs counted by distance, in float64 and int64, M distances ascending; only distances that some pair has.

    Distances stand on the far edges of the cells of `dml.metrics.pair_counts`, 1e-6 of similarity wide: pairs of one
    cell are ties, and a threshold at any of these distances accepts whole cells.
    """

    distances_M: Floats
    """Ascending, each within [0, 2] but for the width of a cell."""
    positives_M: Counts
    """Positives at exactly this distance."""
    negatives_M: Counts
    """Negatives at exactly this distance."""
    distance: Distance
    """"euclidean" or "cosine"."""

    def __post_init__(self) -> None:
        if not self.positives or not self.negatives:
            raise ValueError(
                f"rates need pairs of both kinds, got {self.positives:,} positives and {self.negatives:,} negatives"
            )

    @cached_property
    def positives(self) -> int:
        """Pairs of one class."""
        return int(self.positives_M.sum())

    @cached_property
    def negatives(self) -> int:
        """Pairs of two classes."""
        return int(self.negatives_M.sum())

    @cached_property
    def far_M(self) -> Floats:  # noqa: N802
        """False accept rate when every pair at this distance or nearer is accepted; ascending to 1."""
        return np.asarray(self.negatives_M.cumsum() / self.negatives, dtype=np.float64)

    @cached_property
    def frr_M(self) -> Floats:  # noqa: N802
        """False reject rate when every pair at this distance or nearer is accepted; descending to 0."""
        return np.asarray((self.positives - self.positives_M.cumsum()) / self.positives, dtype=np.float64)

    @cached_property
    def auc(self) -> float:
        """Area under the ROC curve: the chance that a positive is nearer than a negative, ties counting one half."""
        beaten_M = self.negatives - self.negatives_M.cumsum() + self.negatives_M / 2
        return float((self.positives_M / self.positives) @ (beaten_M / self.negatives))

    @cached_property
    def equal_error_rate(self) -> float:
        """The rate at which FAR and FRR are equal, on the straight line between the ROC's points on either side."""
        at = int((self.far_M >= self.frr_M).argmax())
        far_before, frr_before = (self.far_M[at - 1], self.frr_M[at - 1]) if at else (0.0, 1.0)
        gap_before, gap = frr_before - far_before, self.far_M[at] - self.frr_M[at]
        share = gap_before / (gap_before + gap)
        return float(far_before + share * (self.far_M[at] - far_before))


def pair_distances(
    embeddings_ND: Array,
    labels_N: Array,
    *,
    gallery: tuple[Array, Array] | None = None,
    distance: Distance = "euclidean",
    group: Group | None = None,
) -> PairDistances:
    """Count all unordered pairs, or all queries against all of a gallery, by distance.

    Exact but for ties within a cell. Memory: a few tiles of similarities a thread and the cells, 42 MB each thread.

    Args:
        embeddings_ND: (N, D) floats, NumPy or torch; rows are normalised. The queries, where there is a gallery.
        labels_N: (N,) integers.
        gallery: embeddings (G, D) and labels (G,) that the rows are compared with, instead of one another.
        distance: "euclidean", sqrt(2 - 2 s) in [0, 2], or "cosine", 1 - s in [0, 2].
        group: ranks that share the work, each called with the same arrays; every rank gets the whole result.

    Raises:
        ValueError: bad input (see `dml.metrics.inputs`).
    """
    check_distance(distance)
    return distances_of(PairGrid.of(embeddings_ND, labels_N, gallery), distance, group)


def distances_of(grid: PairGrid, distance: Distance, group: Group | None = None) -> PairDistances:
    """`pair_distances` of checked and sorted rows."""
    with full_precision(grid.device):
        positives, negatives = similarity_histograms(grid, group)
    return from_histograms(positives, negatives, distance)


def from_histograms(positives: Counts, negatives: Counts, distance: Distance) -> PairDistances:
    """Pairs by distance from two histograms over the cells of `dml.metrics.pair_counts`, similarity ascending."""
    cells_M = (positives + negatives).nonzero()[0][::-1]
    edges_M = np.array([cell_edge(int(cell)) for cell in cells_M], dtype=np.float64)
    return PairDistances(to_distance(edges_M, distance), positives[cells_M], negatives[cells_M], distance)


class Rates(NamedTuple):
    """What a threshold does to a set of pairs."""

    far: float
    """Accepted negatives / negatives."""
    frr: float
    """Rejected positives / positives."""


def rates_at(pairs: PairDistances, threshold: float) -> Rates:
    """FAR and FRR when pairs at this distance or nearer are accepted.

    A threshold that falls inside a cell (1e-6 of similarity) rejects that cell; calibrated thresholds never do.

    Raises:
        ValueError: a threshold that is negative or NaN.
    """
    farthest = to_distance(accepting_similarity(threshold, pairs.distance), pairs.distance)
    accepted = int(pairs.distances_M.searchsorted(max(threshold, float(farthest)), side="right"))
    if not accepted:
        return Rates(0.0, 1.0)
    return Rates(float(pairs.far_M[accepted - 1]), float(pairs.frr_M[accepted - 1]))


def accepting_similarity(threshold: float, distance: Distance) -> float:
    """The cosine similarity from which on a threshold accepts pairs.

    Rounding moves the similarity of duplicates off 1 and that of opposites off -1: at a distance of 0 the cell of the
    one is accepted whole, at 2 that of the other.

    Raises:
        ValueError: a threshold that is negative or NaN.
    """
    if not threshold >= 0:
        raise ValueError(f"a threshold is a distance, 0 or more, got {threshold:g}")
    similarity = float(to_similarity(threshold, distance))
    return cell_edge(cell_of(-1.0)) if similarity <= -1 else min(similarity, cell_edge(cell_of(1.0)))


def check_distance(distance: str) -> None:
    """Raise ValueError for a distance that is not among DISTANCES."""
    if distance not in DISTANCES:
        raise ValueError(unknown("distance", distance, DISTANCES))


def to_distance(similarity: float | Floats, distance: Distance) -> Floats:
    """Distance of unit vectors from their cosine similarity, in float64."""
    cosine_distance = 1.0 - np.asarray(similarity, dtype=np.float64)
    return cosine_distance if distance == "cosine" else np.sqrt(2.0 * cosine_distance)


def to_similarity(threshold: float | Floats, distance: Distance) -> Floats:
    """Cosine similarity of unit vectors from their distance, in float64."""
    threshold = np.asarray(threshold, dtype=np.float64)
    return 1.0 - (threshold if distance == "cosine" else threshold**2 / 2.0)

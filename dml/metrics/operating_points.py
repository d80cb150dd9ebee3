"""Operating points: the distance threshold at which the global false accept rate meets a target."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from dml.metrics.inputs import Array, Counts, Floats, full_precision
from dml.metrics.pair_counts import SortedRows, cell_edge, similarity_histograms
from dml.names import unknown

Distance: TypeAlias = Literal["euclidean", "cosine"]

DISTANCES: tuple[Distance, ...] = ("euclidean", "cosine")


class UnreachableFARError(ValueError):
    """Too few negatives, or too many alike, for any threshold to have a FAR this small."""


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold and what it did to the pairs that it was calibrated on; `dataclasses.asdict` gives JSON."""

    far_target: float
    """The false accept rate asked for."""
    threshold: float
    """Pairs at this distance or nearer are accepted."""
    far: float
    """Accepted negatives / negatives, at most far_target."""
    frr: float
    """Rejected positives / positives."""
    negatives: int
    """Unordered pairs of two classes."""
    positives: int
    """Unordered pairs of one class."""


def calibrate(
    embeddings_ND: Array,
    labels_N: Array,
    *,
    far: Sequence[float] = (1e-1, 1e-2, 1e-3),
    distance: Distance = "euclidean",
) -> tuple[OperatingPoint, ...]:
    """Find, for each FAR target, the largest distance threshold that keeps to it on all pairs of these samples.

    A pair is accepted when its distance is at most the threshold. The threshold is that of the farthest negative which
    can still be accepted (negatives of equal distance are accepted together, so the achieved FAR may lie below the
    target), rounded up by less than 1e-6 in similarity.

    Args:
        embeddings_ND: (N, D) floats, NumPy or torch; rows are normalised.
        labels_N: (N,) integers.
        far: targets, each between 0 and 1.
        distance: "euclidean", sqrt(2 - 2 s) in [0, 2], or "cosine", 1 - s in [0, 2].

    Returns:
        One operating point a target, in the order of the targets.

    Raises:
        ValueError: bad input (see `dml.metrics.inputs.unit_rows`), or a target that these negatives do not resolve.
    """
    check_distance(distance)
    for target in far:
        if not 0 < target < 1:
            raise ValueError(f"a FAR target must lie between 0 and 1, got {target:g}")
    rows = SortedRows.of(embeddings_ND, labels_N)
    with full_precision(rows.rows_MD.device):
        positives, negatives = similarity_histograms(rows)
    return tuple(_operating_point(positives, negatives, target, distance) for target in far)


def _operating_point(positives: Counts, negatives: Counts, target: float, distance: Distance) -> OperatingPoint:
    cell = cell_of_far(negatives, target)
    total_neg, total_pos = int(negatives.sum()), int(positives.sum())
    return OperatingPoint(
        far_target=float(target),
        threshold=float(to_distance(cell_edge(cell), distance)),
        far=int(negatives[cell:].sum()) / total_neg,
        frr=int(positives[:cell].sum()) / total_pos,
        negatives=total_neg,
        positives=total_pos,
    )


def cell_of_far(negatives: Counts, far: float) -> int:
    """The lowest cell of similarity that holds a negative and can be accepted, with all above it, at this FAR.

    Args:
        negatives: a histogram of `dml.metrics.pair_counts`.
        far: the target, between 0 and 1.

    Raises:
        UnreachableFARError: even the nearest negatives exceed the target; it names the smallest FAR that they resolve.
    """
    occupied = negatives.nonzero()[0]
    far_from = negatives[occupied][::-1].cumsum()[::-1] / negatives.sum()
    reached = occupied[far_from <= far]
    if not len(reached):
        raise UnreachableFARError(
            f"FAR {far:g} cannot be reached: "
            f"{int(negatives.sum()):,} negative pairs resolve no FAR below {far_from[-1]:.3g}"
        )
    return int(reached[0])


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

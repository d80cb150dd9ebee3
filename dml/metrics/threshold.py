"""OPIS: how differently one distance threshold treats the classes of a test set.

Zhang et al., "Threshold-Consistent Margin Loss for Open-World Deep Metric Learning", ICLR 2024, arXiv 2307.04047.

    curves = threshold_curves(embeddings, labels)
    opis(curves), noise_floor(curves), mean_utility(curves)

OPIS alone misleads: embeddings that tell no class apart treat all of them alike and score well, and few samples a
class raise it without any fault of the model. Read it beside Recall@1, `mean_utility` and `noise_floor`. Its square
root is in units of utility: class utilities differ by about that much.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from dml.gather import Group
from dml.metrics.inputs import Array, Counts, Floats, full_precision
from dml.metrics.operating_points import OperatingPoint, calibrate
from dml.metrics.pair_counts import PairGrid, cell_edge, cell_of, count_accepted
from dml.metrics.pair_distances import Distance, check_distance, to_similarity
from dml.metrics.threshold_range import Bounds, RangeFrom, ThresholdRange
from dml.names import unknown

__all__ = [
    "OperatingPoint",
    "Reference",
    "ThresholdCurves",
    "calibrate",
    "epsilon_opis",
    "mean_utility",
    "noise_floor",
    "opis",
    "sqrt_opis",
    "threshold_curves",
    "utility",
]

Reference: TypeAlias = Literal["classes", "thresholds"]

_EXACT_PAIRS = 1000


@dataclass(frozen=True, eq=False)
class ThresholdCurves:
    """Sensitivity and specificity of every class over the thresholds of a calibration range."""

    thresholds_T: Floats
    """Ascending, equally spaced, in the chosen distance; a pair at this distance or nearer is accepted."""
    sensitivity_CT: Floats
    """Accepted positives / positives of the class (1 - FRR)."""
    specificity_CT: Floats
    """Rejected negatives / negatives of the class (1 - FAR)."""
    classes_C: Counts
    """Labels of the classes with a positive, ascending."""
    positives_C: Counts
    """Unordered pairs of two samples of the class; pairs of a query of the class and a gallery item of it."""
    negatives_C: Counts
    """Unordered pairs with exactly one end in the class; pairs of a query of the class and any other gallery item."""
    singletons: int
    """Classes with one sample (queries that the gallery has no item for): no curves, but negatives of the others."""
    distance: Distance
    """"euclidean" or "cosine"."""
    range_from: RangeFrom
    """What the ends of the range are: thresholds of two global FARs ("far") or FRRs ("frr"), or given ("distance")."""
    range_bounds: Bounds
    """Lower and upper of those; the upper FRR is that of the lower threshold."""


def threshold_curves(
    embeddings_ND: Array,
    labels_N: Array,
    *,
    gallery: tuple[Array, Array] | None = None,
    far_range: Bounds | None = None,
    frr_range: Bounds | None = None,
    distance_range: Bounds | None = None,
    num_thresholds: int = 101,
    distance: Distance = "euclidean",
    group: Group | None = None,
) -> ThresholdCurves:
    """Measure every class at equally spaced thresholds, from all unordered pairs or from all queries x gallery items.

    The counts at the thresholds are exact. At most one of three ranges says where the thresholds lie; without any it is
    far_range=(0.01, 0.10). Memory: the sorted rows, a few tiles of similarities a thread, and the counts.

    Args:
        embeddings_ND: (N, D) floats of any width, NumPy or torch, any device. Rows are normalised and computed in
            float32 (float64 input in float64) there. The queries, where there is a gallery.
        labels_N: (N,) integers.
        gallery: embeddings (G, D) and labels (G,). A query class's positives are its queries x the items of its label,
            its negatives its queries x all other items; classes of the gallery alone have no curve.
        far_range: lower and upper bound of the global FAR, over the negatives of all classes together. The ends are the
            distances of the farthest negatives that are accepted with at most that FAR: found from all negatives up to
            10 million, from a seeded sample of 10 million beyond.
        frr_range: lower and upper bound of the global FRR, over the positives of all classes together. The ends are the
            smallest thresholds with at most that FRR: the first threshold is that of the upper bound, the last that of
            the lower, since a farther threshold rejects fewer. Found from all positives.
        distance_range: the first and the last threshold, in the chosen distance, within 0 and 2.
        num_thresholds: T, at least 2; both ends are included.
        distance: "euclidean", sqrt(2 - 2 s) in [0, 2], or "cosine", 1 - s in [0, 2]. Equal steps in one are not equal
            steps in the other, so figures of the two do not compare.
        group: ranks that share the work, each with the same arrays and all with the same result; None for this process.

    Raises:
        ValueError: bad input (see `dml.metrics.inputs`), more than one range, bounds that do not ascend within their
            limits, or a bound that these pairs do not resolve (`UnreachableFARError` for a FAR).
    """
    check_distance(distance)
    chosen = ThresholdRange.chosen(far_range, frr_range, distance_range)
    if num_thresholds < 2:
        raise ValueError(f"num_thresholds must be at least 2, got {num_thresholds}")
    grid = PairGrid.of(embeddings_ND, labels_N, gallery)
    with full_precision(grid.device):
        thresholds_T = np.linspace(*chosen.ends(grid, distance, group), num_thresholds)
        accepted_pos_CT, accepted_neg_CT = count_accepted(grid, _edges(thresholds_T, distance), group)
    kept = grid.positives_C > 0
    positives_C, negatives_C = grid.positives_C[kept], grid.negatives_C[kept]
    return ThresholdCurves(
        thresholds_T=thresholds_T,
        sensitivity_CT=accepted_pos_CT[kept] / positives_C[:, None],
        specificity_CT=1.0 - np.divide(accepted_neg_CT[kept], negatives_C[:, None]),
        classes_C=grid.labels_C[kept],
        positives_C=positives_C,
        negatives_C=negatives_C,
        singletons=int((~kept).sum()),
        distance=distance,
        range_from=chosen.made_from,
        range_bounds=chosen.bounds,
    )


def _edges(thresholds_T: Floats, distance: Distance) -> Floats:
    # Rounding moves the similarity of duplicates off 1 and that of opposites off -1: they stay inside their cells.
    edges_T = to_similarity(thresholds_T, distance)
    return np.where(edges_T <= -1, cell_edge(cell_of(-1.0)), np.minimum(edges_T, cell_edge(cell_of(1.0))))


def utility(curves: ThresholdCurves, c: float = 1.0) -> Floats:
    """U = (1 + c^2) phi psi / (c^2 phi + psi) with sensitivity psi and specificity phi, 0 where both are 0.

    c = 1 is their harmonic mean, the F1 form; c > 1 favours sensitivity.

    Returns:
        (C, T) float64 in [0, 1].
    """
    return _utility(curves.sensitivity_CT, curves.specificity_CT, c)


def opis(curves: ThresholdCurves, c: float = 1.0, reference: Reference = "classes") -> float:
    """Operating-point-inconsistency score (arXiv 2307.04047): how far utilities lie from their reference; 0 is best.

    Args:
        curves: of `threshold_curves`.
        c: weight of the utility.
        reference: "classes": mean over classes and thresholds d of (U_i(d) - mean over classes of U(d))^2, the
            variance of utility over classes, averaged over thresholds. "thresholds": of (U_i(d) - mean over thresholds
            of U_i)^2, how far each class strays from its own average over the range.

    Returns:
        In [0, 0.25].

    Raises:
        ValueError: an unknown reference.
    """
    references: dict[str, int] = {"classes": 0, "thresholds": 1}
    if reference not in references:
        raise ValueError(unknown("reference", reference, references))
    return float(utility(curves, c).var(axis=references[reference]).mean())


def sqrt_opis(curves: ThresholdCurves, c: float = 1.0, reference: Reference = "classes") -> float:
    """The square root of `opis`, in [0, 0.5] and in units of utility: class utilities differ by about this much."""
    return math.sqrt(opis(curves, c, reference))


def epsilon_opis(curves: ThresholdCurves, epsilon: float = 0.1, c: float = 1.0) -> float:
    """The worst classes against the best: squared difference of their mean utilities, averaged over thresholds.

    The paper names the measure; here classes are ranked anew at each threshold, and each side takes
    max(1, round(epsilon C)) of them.

    Args:
        curves: of `threshold_curves`.
        epsilon: share of the classes on each side, above 0 and at most 0.5.
        c: weight of the utility.

    Raises:
        ValueError: an epsilon out of range.
    """
    if not 0 < epsilon <= 0.5:
        raise ValueError(f"epsilon must lie above 0 and at most at 0.5, got {epsilon:g}")
    ranked_CT = np.sort(utility(curves, c), axis=0)
    k = max(1, round(epsilon * len(ranked_CT)))
    return float(((ranked_CT[-k:].mean(axis=0) - ranked_CT[:k].mean(axis=0)) ** 2).mean())


def mean_utility(curves: ThresholdCurves, c: float = 1.0) -> float:
    """Utility averaged over classes and thresholds, in [0, 1]: what OPIS must not be bought with."""
    return float(utility(curves, c).mean())


def noise_floor(curves: ThresholdCurves, c: float = 1.0) -> float:
    """OPIS to expect from counting few pairs, were all classes the same.

    Every class is given the pooled sensitivity and specificity (of the pairs of all classes together) as its truth at
    each threshold, and binomial counts of its own numbers of pairs. Positives are few, so the mean and the variance of
    utility over them are summed exactly up to 1,000 pairs; beyond, and for the many negatives, by the delta method.

    It assumes independent pairs. Pairs of one class share samples and are not, so the true floor lies higher the more
    pairs a sample is in: in a simulation 1.0, 1.7, 3.3 and 10 times at 2, 4, 12 and 40 samples a class. An OPIS near
    this floor says nothing about the model.

    Returns:
        Expected OPIS, in the units of `opis`.
    """
    positives_C1, negatives_C1 = curves.positives_C[:, None], curves.negatives_C[:, None]
    psi_T = (curves.sensitivity_CT * positives_C1).sum(axis=0) / positives_C1.sum()
    phi_T = (curves.specificity_CT * negatives_C1).sum(axis=0) / negatives_C1.sum()
    sizes, which_C = np.unique(curves.positives_C, return_inverse=True)
    moments = np.array([_utility_moments(int(pairs), psi_T, phi_T, c) for pairs in sizes])
    mean_CT, variance_CT = moments[which_C, 0], moments[which_C, 1]
    _, by_phi_T = _slopes(psi_T, phi_T, c)
    variance_CT = variance_CT + by_phi_T**2 * phi_T * (1 - phi_T) / negatives_C1
    share = 1 - 1 / len(which_C)  # the classes' own mean takes up one degree of freedom
    return float((share * variance_CT.mean(axis=0) + mean_CT.var(axis=0)).mean())


def _utility_moments(pairs: int, psi_T: Floats, phi_T: Floats, c: float) -> tuple[Floats, Floats]:
    """Mean and variance of utility when sensitivity is Binomial(pairs, psi) / pairs."""
    if pairs > _EXACT_PAIRS:
        by_psi_T, _ = _slopes(psi_T, phi_T, c)
        return _utility(psi_T, phi_T, c), by_psi_T**2 * psi_T * (1 - psi_T) / pairs
    k = np.arange(pairs + 1)[:, None]
    ways = np.array([math.lgamma(pairs + 1) - math.lgamma(i + 1) - math.lgamma(pairs - i + 1) for i in k[:, 0]])
    inside_T = psi_T.clip(1e-300, 1 - 1e-16)
    chance_KT = np.exp(ways[:, None] + k * np.log(inside_T) + (pairs - k) * np.log1p(-inside_T))
    utility_KT = _utility(k / pairs, phi_T, c)
    mean_T = (chance_KT * utility_KT).sum(axis=0)
    return mean_T, (chance_KT * (utility_KT - mean_T) ** 2).sum(axis=0)


def _utility(psi: Floats, phi: Floats, c: float) -> Floats:
    if not c > 0:
        raise ValueError(f"the utility's c must be positive, got {c:g}")
    below = c**2 * phi + psi
    return np.divide((1 + c**2) * phi * psi, below, out=np.zeros_like(below), where=below > 0)


def _slopes(psi: Floats, phi: Floats, c: float) -> tuple[Floats, Floats]:
    """Derivatives of the utility by sensitivity and by specificity, 0 where it has none."""
    below = (c**2 * phi + psi) ** 2
    scale = np.divide(1 + c**2, below, out=np.zeros_like(below), where=below > 0)
    return scale * c**2 * phi**2, scale * psi**2

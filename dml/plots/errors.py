"""False accepts and false rejects of pairs, by the distance threshold, and the distances that make them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dml.metrics.inputs import Counts, Floats
from dml.metrics.operating_points import OperatingPoint
from dml.metrics.pair_distances import PairDistances, rates_at, to_distance, to_similarity
from dml.plots.style import ACCENT, INK, MUTED, WARN, blank, clean, legend_above, margin_note, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEPS = 2000
"""Thresholds at which curves are drawn where there are more distances than that: finer than a figure's pixels."""
_BINS = 120


def error_rates(
    pairs: PairDistances, operating_points: Sequence[OperatingPoint] = (), *, title: str | None = None
) -> "Figure":
    """FAR and FRR against the threshold, rates on a logarithmic axis; equal error rate and pairs in the caption.

    Operating points stand where their thresholds fall on these pairs, whatever pairs they were calibrated on.

    Args:
        pairs: of `dml.metrics.pair_distances.pair_distances`.
        operating_points: thresholds to mark; those in another distance are converted to that of the pairs.
        title: drawn above; none when unset.
    """
    figure = blank(8.0 if operating_points else 6.4, 4.8, title)
    axes = figure.subplots()
    x, far, frr = _rates(pairs)
    axes.set_yscale("log", nonpositive="clip")
    axes.plot(x, far, color=WARN, linewidth=2, drawstyle="steps-post", label="FAR (negatives accepted)")
    axes.plot(x, frr, "--", color=ACCENT, linewidth=2, drawstyle="steps-post", label="FRR (positives rejected)")
    equal, at = pairs.equal_error_rate, float(pairs.distances_M[(pairs.far_M >= pairs.frr_M).argmax()])
    targets = [point.far_target for point in operating_points]
    smallest = 1 / max(pairs.positives, pairs.negatives)
    low = min(0.1, max(smallest / 2, min([1e-4, equal or 1.0, *targets]) / 10))
    axes.set_ylim(low, 1.35)
    axes.plot([at], [max(equal, low)], "D", color=INK, markersize=6, clip_on=False, label="equal error rate")
    _mark(axes, pairs, operating_points)
    caption = f"equal error rate {equal:.3g} at {at:.3f}, AUC {pairs.auc:.4g}"
    axes.set_xlabel(f"{pairs.distance} distance threshold\n{caption}\n{_caption(pairs)}")
    axes.set_ylabel("error rate")
    legend_above(axes)
    clean(axes)
    return figure


def distance_histograms(
    pairs: PairDistances, thresholds: Sequence[float] = (), *, title: str | None = None
) -> "Figure":
    """Densities of the distances of positives and of negatives; a threshold cuts both, and how much is written beside.

    Args:
        pairs: of `dml.metrics.pair_distances.pair_distances`.
        thresholds: drawn as lines, in the distance of the pairs.
        title: drawn above; none when unset.
    """
    figure = blank(6.4, 4.8, title)
    axes = figure.subplots()
    edges = _edges(pairs)
    kinds = ((pairs.negatives_M, "negatives, two classes", WARN), (pairs.positives_M, "positives, one class", ACCENT))
    for counts_M, label, color in kinds:
        density = _density(pairs.distances_M, counts_M, edges)
        axes.stairs(density, edges, fill=True, color=color, alpha=0.3)
        axes.stairs(density, edges, color=color, linewidth=1.6, label=label)
    axes.set_ylim(0, axes.get_ylim()[1])
    axes.set_xlim(edges[0] - 0.02 * (edges[-1] - edges[0]), edges[-1] + 0.02 * (edges[-1] - edges[0]))
    _cut(axes, pairs, thresholds)
    axes.set_xlabel(f"{pairs.distance} distance\nAUC {pairs.auc:.4g}\n{_caption(pairs)}")
    axes.set_ylabel("density")
    legend_above(axes)
    clean(axes)
    return figure


def _caption(pairs: PairDistances) -> str:
    return f"{pairs.positives:,} positive and {pairs.negatives:,} negative pairs"


def _rates(pairs: PairDistances) -> tuple[Floats, Floats, Floats]:
    """Thresholds, FAR and FRR: at every distance or at STEPS of equal spacing, with one before and one after."""
    x = pairs.distances_M
    if len(x) > STEPS:
        x = np.linspace(x[0], x[-1], STEPS)
    at = pairs.distances_M.searchsorted(x, side="right") - 1
    room = max(0.02 * (x[-1] - x[0]), 0.01)
    ends = x[0] - room, x[-1] + room
    return np.r_[ends[0], x, ends[1]], np.r_[0.0, pairs.far_M[at], 1.0], np.r_[1.0, pairs.frr_M[at], 0.0]


def _edges(pairs: PairDistances) -> Floats:
    low, high = float(pairs.distances_M[0]), float(pairs.distances_M[-1])
    bins = int(np.clip(2 * min(pairs.positives, pairs.negatives) ** (1 / 3), 10, _BINS))
    room = max(0.0, 0.1 - (high - low)) / 2  # all pairs at one distance still make a bar
    return np.linspace(low - room, high + room, bins + 1)


def _density(distances_M: Floats, counts_M: Counts, edges: Floats) -> Floats:
    counts, _ = np.histogram(distances_M, edges, weights=counts_M)
    return np.asarray(counts / counts_M.sum() / np.diff(edges), dtype=np.float64)


def _cut(axes: "Axes", pairs: PairDistances, thresholds: Sequence[float]) -> None:
    """A line at each threshold, and what it does written along it."""
    low, high = axes.get_xlim()
    low, high = min([low, *thresholds]), max([high, *thresholds])
    axes.set_xlim(low, high)
    places = spread([(threshold - low) / (high - low) for threshold in thresholds], 0.04, 0.04, 1.0)
    for threshold, place in zip(thresholds, places, strict=True):
        far, frr = rates_at(pairs, threshold)
        axes.axvline(threshold, color=INK, linewidth=1.2, linestyle="--")
        axes.annotate(
            f"{threshold:.3f}: FAR {far:.2g}, FRR {frr:.2g}",
            (place, 0.985),
            xycoords="axes fraction",
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            va="top",
            rotation=90,
            fontsize=8,
            color=INK,
            bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1},
        )


def _mark(axes: "Axes", pairs: PairDistances, points: Sequence[OperatingPoint]) -> None:
    """A line at each threshold, its rates as dots, and what they are in the right margin."""
    thresholds = [_threshold(point, pairs) for point in points]
    rates = [rates_at(pairs, threshold) for threshold in thresholds]
    low, high = (np.log10(limit) for limit in axes.get_ylim())
    heights = [(np.log10(max(far, 10**low)) - low) / (high - low) for far, _ in rates]
    places = spread(heights, 0.1, 0.03, 0.97)
    for point, threshold, (far, frr), height in zip(points, thresholds, rates, places, strict=True):
        axes.axvline(threshold, color=MUTED, linewidth=1, linestyle="--", zorder=1.5)
        axes.plot([threshold] * 2, [far, frr], color=INK, marker="o", markersize=4.5, linestyle="none", zorder=4)
        text = f"FAR target {point.far_target:g}, threshold {threshold:.3f}\nFAR {far:.3g}, FRR {frr:.3g}"
        margin_note(axes, text, (threshold, max(far, 10**low)), height)


def _threshold(point: OperatingPoint, pairs: PairDistances) -> float:
    if point.distance == pairs.distance:
        return point.threshold
    return float(to_distance(to_similarity(point.threshold, point.distance), pairs.distance))

"""Utility against threshold, class by class, of one model or of two."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dml.metrics.threshold import ThresholdCurves, mean_utility, noise_floor, opis, utility
from dml.plots.style import ACCENT, INK, MUTED, blank, clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = 60
"""Up to so many classes get a line of their own; of more, bands show how they spread."""

_BANDS = ((0.01, 0.99, "#d6e6ee"), (0.10, 0.90, "#a9cbdc"), (0.25, 0.75, "#75acc7"))


def utility_curves(curves: ThresholdCurves, *, c: float = 1.0, title: str | None = None) -> "Figure":
    """Utility against threshold over the calibration range: the classes thin, their mean bold, OPIS in the caption.

    Args:
        curves: of `dml.metrics.threshold.threshold_curves`.
        c: weight of the utility.
        title: drawn above; none when unset.
    """
    figure = blank(6.4, 4.8, title)
    axes = figure.subplots()
    _draw_utility(axes, curves, c)
    axes.set_ylim(_lower_limit([curves], c), 1.005)
    return figure


def compare_utility(
    baseline: ThresholdCurves,
    champion: ThresholdCurves,
    *,
    c: float = 1.0,
    names: tuple[str, str] = ("baseline", "champion"),
    title: str | None = None,
) -> "Figure":
    """The utility curves of two models side by side on the same axes.

    Raises:
        ValueError: curves over different distances.
    """
    if baseline.distance != champion.distance:
        raise ValueError(f"cannot compare curves over {baseline.distance} and {champion.distance} distance")
    figure = blank(10.4, 4.8, title)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, curves, name in zip(panels, (baseline, champion), names, strict=True):
        _draw_utility(axes, curves, c)
        axes.set_title(name, fontsize=11, color=INK)
    panels[0].set_ylim(_lower_limit([baseline, champion], c), 1.005)
    panels[1].set_ylabel("")
    return figure


def _draw_utility(axes: "Axes", curves: ThresholdCurves, c: float) -> None:
    utility_CT, x = utility(curves, c), curves.thresholds_T
    classes = len(utility_CT)
    if classes <= LINES:
        axes.plot(x, utility_CT.T, color=ACCENT, alpha=0.35, linewidth=0.8)
        axes.plot([], [], color=ACCENT, alpha=0.6, linewidth=0.8, label=f"one class ({classes} in all)")
    else:
        for low, high, color in _BANDS:
            edges = np.quantile(utility_CT, (low, high), axis=0)
            label = f"{high - low:.0%} of {classes:,} classes"
            axes.fill_between(x, *edges, color=color, linewidth=0, label=label)
    axes.plot(x, utility_CT.mean(axis=0), color=INK, linewidth=2.4, label="mean over classes")
    # A farther threshold accepts more and rejects less, so the lower FRR stands at the upper end.
    bounds = curves.range_bounds[::-1] if curves.range_from == "frr" else curves.range_bounds
    name = {"far": "FAR", "frr": "FRR", "distance": "distance"}[curves.range_from]
    for bound, end, side in zip(bounds, (x[0], x[-1]), ("right", "left"), strict=True):
        axes.axvline(end, color=MUTED, linewidth=1, linestyle="--")
        shift = (-3 if side == "right" else 3, 4)
        where: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "xytext": shift, "textcoords": "offset points"}
        axes.annotate(f"{name} {bound:g}", (end, 0), ha=side, rotation=90, fontsize=8, color=MUTED, **where)
    axes.set_xlabel(f"{curves.distance} distance threshold\n{_caption(curves, c)}")
    axes.set_ylabel("utility" if c == 1 else f"utility (c = {c:g})")
    axes.margins(x=0.08)
    axes.legend(loc="lower right", bbox_to_anchor=(0.93, 0), framealpha=0.8, edgecolor="none", fontsize=8)
    clean(axes)


def _caption(curves: ThresholdCurves, c: float) -> str:
    score, floor = opis(curves, c), noise_floor(curves, c)
    return (
        f"OPIS {score:.3g} (sqrt {score**0.5:.3f}), noise floor {floor:.2g}, mean utility {mean_utility(curves, c):.3f}"
    )


def _lower_limit(several: Sequence[ThresholdCurves], c: float) -> float:
    """Low enough for nearly every class, so that one lost class does not press the others flat against the top."""
    low = min(float(np.quantile(utility(curves, c), 0.005)) for curves in several)
    return max(-0.02, low - 0.25 * (1 - low) - 0.02)

"""Figures from results: they hold no state, open no window and need no display."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dml.metrics.threshold import ThresholdCurves, mean_utility, noise_floor, opis, utility
from dml.names import unknown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = 60
"""Up to so many classes get a line of their own; of more, bands show how they spread."""

_BANDS = ((0.01, 0.99, "#d6e6ee"), (0.10, 0.90, "#a9cbdc"), (0.25, 0.75, "#75acc7"))
_INK, _ACCENT, _MUTED = "#1f2933", "#0b6e99", "#8a96a3"
_STATES: dict[str, dict[str, Any]] = {
    "other": {"marker": "o", "s": 36, "color": _MUTED, "label": "trial", "zorder": 2},
    "baseline": {"marker": "s", "s": 80, "color": _INK, "label": "baseline, no TCM", "zorder": 3},
    "winner": {"marker": "*", "s": 220, "color": "#d1495b", "label": "winner", "zorder": 4},
}


def utility_curves(curves: ThresholdCurves, *, c: float = 1.0, title: str | None = None) -> "Figure":
    """Utility against threshold over the calibration range: the classes thin, their mean bold, OPIS in the caption.

    Args:
        curves: of `dml.metrics.threshold.threshold_curves`.
        c: weight of the utility.
        title: drawn above; none when unset.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    _draw_utility(axes, curves, c)
    axes.set_ylim(_lower_limit([curves], c), 1.005)
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold", color=_INK)
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
    from matplotlib.figure import Figure

    if baseline.distance != champion.distance:
        raise ValueError(f"cannot compare curves over {baseline.distance} and {champion.distance} distance")
    figure = Figure(figsize=(10.4, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, curves, name in zip(panels, (baseline, champion), names, strict=True):
        _draw_utility(axes, curves, c)
        axes.set_title(name, fontsize=11, color=_INK)
    panels[0].set_ylim(_lower_limit([baseline, champion], c), 1.005)
    panels[1].set_ylabel("")
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold", color=_INK)
    return figure


def search_scatter(rows: Sequence[Mapping[str, Any]], *, title: str | None = None) -> "Figure":
    """Recall@1 against sqrt(OPIS) for the trials of a search; the upper left corner is where one wants to be.

    Args:
        rows: one a trial, with the keys number (int), recall and opis (floats, Recall@1 and OPIS) and state
            ("baseline", "winner" or "other").
        title: drawn above; none when unset.

    Raises:
        ValueError: no trial, or an unknown state.
    """
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("needs at least one trial to draw")
    for row in rows:
        if row["state"] not in _STATES:
            raise ValueError(unknown("state", row["state"], _STATES))
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for state, style in _STATES.items():
        x, y = _points([row for row in rows if row["state"] == state]).T
        if len(x):
            axes.scatter(x, y, linewidths=0.8, edgecolors="white", **style)
    for row, (x, y) in zip(rows, _points(rows), strict=True):
        axes.annotate(str(row["number"]), (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8, color=_INK)
    axes.set_xlabel("sqrt(OPIS), in units of utility (lower is more consistent)")
    axes.set_ylabel("Recall@1")
    axes.margins(0.12)
    axes.legend(loc="best", frameon=False, fontsize=9)
    _clean(axes)
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold", color=_INK)
    return figure


def _points(rows: Sequence[Mapping[str, Any]]) -> "np.ndarray[Any, Any]":
    return np.array([(float(row["opis"]) ** 0.5, float(row["recall"])) for row in rows]).reshape(-1, 2)


def _draw_utility(axes: "Axes", curves: ThresholdCurves, c: float) -> None:
    utility_CT, x = utility(curves, c), curves.thresholds_T
    classes = len(utility_CT)
    if classes <= LINES:
        axes.plot(x, utility_CT.T, color=_ACCENT, alpha=0.35, linewidth=0.8)
        axes.plot([], [], color=_ACCENT, alpha=0.6, linewidth=0.8, label=f"one class ({classes} in all)")
    else:
        for low, high, color in _BANDS:
            edges = np.quantile(utility_CT, (low, high), axis=0)
            label = f"{high - low:.0%} of {classes:,} classes"
            axes.fill_between(x, *edges, color=color, linewidth=0, label=label)
    axes.plot(x, utility_CT.mean(axis=0), color=_INK, linewidth=2.4, label="mean over classes")
    for far, end, side in zip(curves.far_range, (x[0], x[-1]), ("right", "left"), strict=True):
        axes.axvline(end, color=_MUTED, linewidth=1, linestyle="--")
        shift = (-3 if side == "right" else 3, 4)
        where: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "xytext": shift, "textcoords": "offset points"}
        axes.annotate(f"FAR {far:g}", (end, 0), ha=side, rotation=90, fontsize=8, color=_MUTED, **where)
    axes.set_xlabel(f"{curves.distance} distance threshold\n{_caption(curves, c)}")
    axes.set_ylabel("utility" if c == 1 else f"utility (c = {c:g})")
    axes.margins(x=0.08)
    axes.legend(loc="lower right", bbox_to_anchor=(0.93, 0), framealpha=0.8, edgecolor="none", fontsize=8)
    _clean(axes)


def _caption(curves: ThresholdCurves, c: float) -> str:
    score, floor = opis(curves, c), noise_floor(curves, c)
    return (
        f"OPIS {score:.3g} (sqrt {score**0.5:.3f}), noise floor {floor:.2g}, mean utility {mean_utility(curves, c):.3f}"
    )


def _lower_limit(several: Sequence[ThresholdCurves], c: float) -> float:
    """Low enough for nearly every class, so that one lost class does not press the others flat against the top."""
    low = min(float(np.quantile(utility(curves, c), 0.005)) for curves in several)
    return max(-0.02, low - 0.25 * (1 - low) - 0.02)


def _clean(axes: "Axes") -> None:
    axes.grid(visible=True, color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

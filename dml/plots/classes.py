"""What one threshold does to each class."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dml.metrics.inputs import Floats
from dml.plots.style import ACCENT, INK, WARN, blank, clean, legend_above, margin_note, short, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAND = (0.05, 0.95)
"""Quantiles of the classes that the band spans."""


def class_far(
    far_C: npt.ArrayLike,
    *,
    far_target: float,
    far: float | None = None,
    threshold: float | None = None,
    names: Sequence[str] | None = None,
    worst: int = 8,
    title: str | None = None,
) -> "Figure":
    """The false accept rates of the classes at one threshold, ascending; the promise and the worst classes marked.

    The axis of rates is logarithmic; where classes have no false accept, linear below, so that they are seen as well.

    Args:
        far_C: (C,) rates in [0, 1].
        far_target: the rate that the threshold was calibrated for.
        far: the rate over the pairs of all classes together; a line when given.
        threshold: named in the caption when given.
        names: of the classes, in the order of far_C; their positions when unset.
        worst: so many classes of the largest rates are named.
        title: drawn above; none when unset.

    Raises:
        ValueError: no class, rates that are not in [0, 1], a target not above 0, or a number of names other than C.
    """
    from matplotlib.ticker import MaxNLocator

    rates_C = _checked(far_C, far_target, names)
    order_C = np.argsort(rates_C, kind="stable")
    figure = blank(8.0 if worst else 6.4, 4.8, title)
    axes = figure.subplots()
    classes = len(rates_C)
    low, high = np.quantile(rates_C, BAND)
    axes.axhspan(low, high, color="#d6e6ee", linewidth=0, label=f"{BAND[1] - BAND[0]:.0%} of {classes:,} classes")
    size = float(np.clip(60 / classes**0.5, 1.8, 7))
    axes.plot(np.arange(classes) + 1, rates_C[order_C], "o", color=ACCENT, markersize=size, label="one class")
    axes.axhline(far_target, color=INK, linewidth=1.4, linestyle="--", label=f"target {far_target:g}")
    if far is not None:
        axes.axhline(far, color=WARN, linewidth=1.4, label=f"all classes together {far:.3g}")
    _scale(axes, np.r_[rates_C, far_target, [] if far is None else far], floor=far_target / 1000)
    axes.set_xlim(1 - 0.03 * classes - 0.2, classes + 0.03 * classes + 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _name_worst(axes, rates_C, order_C, names, worst)
    at = "" if threshold is None else f" at threshold {threshold:.3f}"
    axes.set_xlabel(f"classes, by their FAR\n{_caption(rates_C, far_target)}")
    axes.set_ylabel(f"FAR of the class{at}")
    legend_above(axes)
    clean(axes)
    return figure


def _checked(far_C: npt.ArrayLike, far_target: float, names: Sequence[str] | None) -> Floats:
    rates_C = np.asarray(far_C, dtype=np.float64)
    if rates_C.ndim != 1 or not len(rates_C):
        raise ValueError(f"far_C must be (C,) with a class at least, got shape {rates_C.shape}")
    wrong = np.flatnonzero(~((rates_C >= 0) & (rates_C <= 1)))
    if len(wrong):
        raise ValueError(f"rates must lie in [0, 1], got far_C[{wrong[0]}] = {rates_C[wrong[0]]:g}")
    if not 0 < far_target < 1:
        raise ValueError(f"far_target must lie between 0 and 1, got {far_target:g}")
    if names is not None and len(names) != len(rates_C):
        raise ValueError(f"needs one name a class, got {len(names)} names for {len(rates_C)} classes")
    return rates_C


def _caption(rates_C: Floats, far_target: float) -> str:
    low, middle, high = np.quantile(rates_C, (BAND[0], 0.5, BAND[1]))
    over = int((rates_C > far_target).sum())
    return (
        f"median {middle:.2g}, {BAND[1] - BAND[0]:.0%} of classes within {low:.2g} and {high:.2g}, "
        f"worst {rates_C.max():.2g}\n{over:,} of {len(rates_C):,} classes above the target"
    )


def _scale(axes: "Axes", rates: Floats, floor: float) -> None:
    """Logarithmic, and linear below the floor where rates are 0 or as good as that."""
    least = float(rates[rates > 0].min())
    if rates.min() > 0 and least >= floor:
        axes.set_yscale("log")
        axes.set_ylim(least / 1.5, rates.max() * 1.5)
    else:
        edge = max(floor, least / 2)
        axes.set_yscale("symlog", linthresh=edge, linscale=0.6)
        axes.set_ylim(-0.25 * edge, rates.max() * 2)


def _name_worst(
    axes: "Axes", rates_C: Floats, order_C: npt.NDArray[np.intp], names: Sequence[str] | None, worst: int
) -> None:
    chosen = [int(i) for i in order_C[::-1][:worst] if rates_C[i] > 0]
    # Symlog heights are not rates: the axis itself says where each class stands.
    to_axes = axes.transScale + axes.transLimits
    heights = [to_axes.transform((0, rates_C[i]))[1] for i in chosen]
    for rank, (i, height) in enumerate(zip(chosen, spread(heights, 0.06, 0.02, 0.98), strict=True)):
        name = f"class {i}" if names is None else short(names[i])
        margin_note(axes, f"{name}  {rates_C[i]:.2g}", (len(rates_C) - rank, rates_C[i]), height)

"""What the figures share: colours, clean axes, and names that no figure chokes on."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from dml.metrics.inputs import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Names: TypeAlias = Sequence[str] | Mapping[int, str]
"""Names of classes, by label."""

INK, ACCENT, MUTED, WARN = "#1f2933", "#0b6e99", "#8a96a3", "#d1495b"
RIGHT, WRONG = "#2a9d5c", "#d1495b"
LONGEST = 26
"""Characters of a class's name that are drawn; of a longer one, its beginning and its end."""


def blank(width: float, height: float, title: str | None = None) -> "Figure":
    """An empty figure, sizes in inches, that belongs to no window and no pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(plain(title), fontsize=12, fontweight="bold", color=INK)
    return figure


def clean(axes: "Axes") -> None:
    """A light grid behind the data and no frame at top and right."""
    axes.grid(visible=True, color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend_above(axes: "Axes", columns: int = 4) -> None:
    """The legend in rows above the axes, where it hides no data."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=8,
        borderaxespad=0.2,
        handlelength=1.6,
        columnspacing=1.4,
    )


def margin_note(axes: "Axes", text: str, point: tuple[float, float], height: float) -> None:
    """A note in the right margin, at a height in fractions of the axes, joined to its point by a thin line."""
    axes.annotate(
        text,
        point,
        xytext=(1.04, height),
        textcoords="axes fraction",
        va="center",
        fontsize=8,
        color=INK,
        arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.7, "relpos": (0, 0.5), "shrinkB": 3},
    )


def plain(text: str) -> str:
    """The text on one line, with dollars that are dollars and not mathematics."""
    return " ".join(text.split()).replace("$", r"\$")


def short(name: str, longest: int = LONGEST) -> str:
    """A class's name as it is drawn: at most `longest` characters, the middle of a longer one left out."""
    name = " ".join(str(name).split())
    if len(name) > longest:
        end = (longest - 1) // 3
        name = f"{name[: longest - 1 - end].rstrip()}…{name[-end:].lstrip()}"
    # Matplotlib leaves what begins with an underscore out of legends.
    return plain(name).replace("_", " _", 1) if name.startswith("_") else plain(name)


def name_of(label: int, names: Names | None, longest: int = LONGEST) -> str:
    """The name of a label as it is drawn; the label itself where there are no names."""
    return str(int(label)) if names is None else short(names[int(label)], longest)


def spread(places: Sequence[float], gap: float, low: float, high: float) -> Floats:
    """Places for labels near these, in their order, `gap` apart or as far as [low, high] allows.

    Args:
        places: where each label would like to be, in any order.
        gap: wanted between two neighbours.
        low: no label lies below.
        high: no label lies above.
    """
    wanted = np.asarray(places, dtype=np.float64)
    order = np.argsort(wanted, kind="stable")
    steps = np.arange(len(wanted)) * min(gap, (high - low) / max(1, len(wanted) - 1))
    pushed = np.maximum.accumulate(wanted[order].clip(low, high) - steps)
    found = np.empty_like(wanted)
    found[order] = pushed.clip(max=high - steps[-1:]) + steps
    return found

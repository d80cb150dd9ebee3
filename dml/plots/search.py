"""The trials of a search, each by what it costs and what it gains."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dml.names import unknown
from dml.plots.style import INK, MUTED, WARN, blank, clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STATES: dict[str, dict[str, Any]] = {
    "other": {"marker": "o", "s": 36, "color": MUTED, "label": "trial", "zorder": 2},
    "baseline": {"marker": "s", "s": 80, "color": INK, "label": "baseline, no TCM", "zorder": 3},
    "winner": {"marker": "*", "s": 220, "color": WARN, "label": "winner", "zorder": 4},
}


def search_scatter(rows: Sequence[Mapping[str, Any]], *, title: str | None = None) -> "Figure":
    """Recall@1 against sqrt(OPIS) for the trials of a search; the upper left corner is where one wants to be.

    Args:
        rows: one a trial, with the keys number (int), recall and opis (floats, Recall@1 and OPIS) and state
            ("baseline", "winner" or "other").
        title: drawn above; none when unset.

    Raises:
        ValueError: no trial, or an unknown state.
    """
    if not rows:
        raise ValueError("needs at least one trial to draw")
    for row in rows:
        if row["state"] not in _STATES:
            raise ValueError(unknown("state", row["state"], _STATES))
    figure = blank(6.4, 4.8, title)
    axes = figure.subplots()
    for state, style in _STATES.items():
        x, y = _points([row for row in rows if row["state"] == state]).T
        if len(x):
            axes.scatter(x, y, linewidths=0.8, edgecolors="white", **style)
    for row, (x, y) in zip(rows, _points(rows), strict=True):
        axes.annotate(str(row["number"]), (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8, color=INK)
    axes.set_xlabel("sqrt(OPIS), in units of utility (lower is more consistent)")
    axes.set_ylabel("Recall@1")
    axes.margins(0.12)
    axes.legend(loc="best", frameon=False, fontsize=9)
    clean(axes)
    return figure


def _points(rows: Sequence[Mapping[str, Any]]) -> "np.ndarray[Any, Any]":
    return np.array([(float(row["opis"]) ** 0.5, float(row["recall"])) for row in rows]).reshape(-1, 2)

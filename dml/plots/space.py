"""How embeddings fill their space: the spectrum, and a map in two dimensions."""

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dml.plots.style import ACCENT, MUTED, Names, blank, clean, name_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORED = 20
"""Up to so many classes have a colour each on a map."""
HIGHLIGHTED = 12
"""Of more, so many have; the others are grey."""

_COLORS = ("#0b6e99", "#d1495b", "#e3a018", "#2a9d5c", "#7a4fa3", "#1f2933", "#e07bb0", "#6b8e23", "#4cb7d6", "#a0522d")
_MARKERS = "o^"


def spectrum(singular_values_D: npt.ArrayLike, rho: float, *, title: str | None = None) -> "Figure":
    """Singular values of the embeddings, scaled to sum 1, against the flat spectrum; rho in the caption.

    Args:
        singular_values_D: (D,) at least 0, in any order; of `dml.metrics.space.singular_values`.
        rho: of `dml.metrics.space.spectral_decay`.
        title: drawn above; none when unset.

    Raises:
        ValueError: values that are not finite or negative, or none above 0.
    """
    values_D = np.sort(np.asarray(singular_values_D, dtype=np.float64).reshape(-1))[::-1]
    if not np.isfinite(values_D).all() or (values_D < 0).any() or not values_D.sum() > 0:
        raise ValueError(f"needs singular values at least 0, one of them above, got {values_D[:8]}")
    share_D, n = values_D / values_D.sum(), len(values_D)
    figure = blank(6.4, 4.8, title)
    axes = figure.subplots()
    # Below a millionth of the largest lies rounding; drawn, it would press the rest flat.
    axes.set_yscale("log", nonpositive="mask")
    axes.plot(np.arange(n) + 1, share_D, color=ACCENT, linewidth=2, label="embeddings", **_dots(n))
    axes.axhline(1 / n, color=MUTED, linewidth=1.2, linestyle="--", label=f"flat, 1/{n}")
    axes.set_ylim(max(share_D[share_D > 0].min(), share_D[0] * 1e-6).clip(max=1 / n) / 2, share_D[0] * 2)
    needed = min(n, int(share_D.cumsum().searchsorted(0.9 - 1e-12)) + 1)
    axes.set_xlabel(f"direction\nspectral decay rho {rho:.3g} (0 is flat), {needed} of {n} directions hold 90%")
    axes.set_ylabel("singular value, share of their sum")
    axes.legend(loc="upper right", framealpha=0.8, edgecolor="none", fontsize=8)
    clean(axes)
    return figure


def embedding_map(
    points_N2: npt.ArrayLike,
    labels_N: npt.ArrayLike,
    names: Names | None = None,
    *,
    seed: int = 0,
    title: str | None = None,
) -> "Figure":
    """A map of embeddings, coloured by class; of more than 20 classes a seeded choice of 12, the others grey.

    Args:
        points_N2: (N, 2) of `dml.projection.project`.
        labels_N: (N,) integers.
        names: of the classes, by label.
        seed: of the choice of classes, which is among those with two points at least, where enough have.
        title: drawn above; none when unset.

    Raises:
        ValueError: no points, or shapes that differ.
    """
    points_N2, labels_N = np.asarray(points_N2, dtype=np.float64), np.asarray(labels_N)
    if points_N2.ndim != 2 or points_N2.shape[1] != 2 or labels_N.shape != points_N2.shape[:1] or not len(points_N2):
        raise ValueError(f"needs points (N, 2) and labels (N,), got {points_N2.shape} and {labels_N.shape}")
    figure = blank(8.0, 6.0, title)
    axes = figure.subplots()
    classes_C, sizes_C = np.unique(labels_N, return_counts=True)
    shown = _highlighted(classes_C, sizes_C, seed)
    rest = ~np.isin(labels_N, shown)
    size = float(np.clip(1200 / len(points_N2) ** 0.5, 16, 60)) * (1.6 if rest.any() else 1.0)
    if rest.any():
        label = f"{len(classes_C) - len(shown):,} other classes"
        x, y = points_N2[rest].T
        axes.scatter(x, y, s=size * 0.3, color="#c9cfd6", linewidths=0, label=label)
    for i, which in enumerate(shown):
        style: dict[str, Any] = {"color": _COLORS[i % len(_COLORS)], "marker": _MARKERS[i // len(_COLORS)]}
        x, y = points_N2[labels_N == which].T
        axes.scatter(x, y, s=size, linewidths=0.4, edgecolors="white", label=name_of(which, names), zorder=3, **style)
    _map_frame(axes, f"{len(points_N2):,} samples of {len(classes_C):,} classes; near is alike, far says little")
    return figure


def _dots(n: int) -> dict[str, Any]:
    return {"marker": "o", "markersize": 4} if n <= 64 else {}


def _highlighted(classes_C: npt.NDArray[np.int64], sizes_C: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    if len(classes_C) <= COLORED:
        return classes_C
    several = classes_C[sizes_C > 1]
    choice = several if len(several) >= HIGHLIGHTED else classes_C
    return np.sort(np.random.default_rng(seed).choice(choice, HIGHLIGHTED, replace=False))


def _map_frame(axes: "Axes", caption: str) -> None:
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("#e4e7eb")
    axes.set_xlabel(caption)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)

"""A contact sheet of retrieval: queries, and what was found for them."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dml.plots.style import INK, RIGHT, WRONG, Names, blank, name_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Pixels: TypeAlias = npt.NDArray[np.uint8]
Images: TypeAlias = Sequence[Pixels] | Mapping[int, Pixels]
"""uint8 (H, W) or (H, W, 3) of any size, by id; only those that are drawn are asked for."""

_IMAGE, _COLUMN, _ROW = 1.0, 1.14, 1.46
_NAME = 17


def contact_sheet(
    images: Images,
    labels_N: npt.ArrayLike,
    queries_Q: npt.ArrayLike,
    neighbours_QK: npt.ArrayLike,
    distances_QK: npt.ArrayLike,
    *,
    gallery: tuple[Images, npt.ArrayLike] | None = None,
    names: Names | None = None,
    title: str | None = None,
) -> "Figure":
    """Each row a query and its neighbours, nearest first; the right ones framed green, the wrong ones red and dashed.

    Under each neighbour stand its distance, a tick or a cross, and the name of a wrong one's class.

    Args:
        images: of the samples.
        labels_N: (N,) integers, of the samples.
        queries_Q: (Q,) ids of samples; see `pick_queries`.
        neighbours_QK: (Q, K) ids of samples (of the gallery's items, if there is one); a negative id leaves its place
            empty.
        distances_QK: (Q, K), or similarities: the figures to be written below.
        gallery: images and labels (G,) that neighbours are of.
        names: of the classes, by label.
        title: drawn above; none when unset.

    Raises:
        ValueError: no query, shapes that differ, or an image that is no uint8 (H, W) or (H, W, 3).
    """
    queries_Q, neighbours_QK, distances_QK = np.asarray(queries_Q), np.asarray(neighbours_QK), np.asarray(distances_QK)
    if not len(queries_Q) or neighbours_QK.shape != distances_QK.shape or neighbours_QK.shape[:-1] != queries_Q.shape:
        raise ValueError(
            "needs queries (Q,), neighbours (Q, K) and distances (Q, K) with a query at least, "
            f"got {queries_Q.shape}, {neighbours_QK.shape} and {distances_QK.shape}"
        )
    labels_N = np.asarray(labels_N)
    found, labels_G = (images, labels_N) if gallery is None else (gallery[0], np.asarray(gallery[1]))
    rows, columns = neighbours_QK.shape[0], neighbours_QK.shape[1] + 1
    figure = blank(max(4.8, columns * _COLUMN + 0.4), rows * _ROW + (0.8 if title else 0.5), title)
    figure.supxlabel("below each its distance: ✓ the query's class, ✗ another, named", fontsize=8, color=INK)
    axes = _empty_sheet(figure, rows, columns)
    for row, query in enumerate(queries_Q.tolist()):
        own = int(labels_N[query])
        _draw(axes, row, 0, _pixels(images, query), edgecolor=INK, linewidth=2.2)
        _write(axes, row, 0, "query", name_of(own, names, _NAME), INK)
        for rank, other in enumerate(neighbours_QK[row].tolist()):
            if other < 0:
                continue
            label = int(labels_G[other])
            right = label == own
            style: dict[str, Any] = {"edgecolor": RIGHT} if right else {"edgecolor": WRONG, "linestyle": (0, (3, 1.2))}
            _draw(axes, row, rank + 1, _pixels(found, other), linewidth=2.6, **style)
            second = "" if right else name_of(label, names, _NAME)
            _write(
                axes,
                row,
                rank + 1,
                f"{distances_QK[row, rank]:.3f} {'✓' if right else '✗'}",
                second,
                style["edgecolor"],
            )
    return figure


def pick_queries(correct_N: npt.ArrayLike, count: int, *, seed: int = 0) -> npt.NDArray[np.int64]:
    """Queries for a contact sheet: half of them answered wrongly, half rightly, as far as there are such.

    Args:
        correct_N: (N,) booleans, whether the nearest neighbour is of the query's class.
        count: how many to pick; all, if there are no more.
        seed: of the draw.

    Returns:
        (min(count, N),) positions in correct_N, the wrong ones first, each half ascending.

    Raises:
        ValueError: a count below 1, or correct_N that is no (N,) of booleans.
    """
    correct_N = np.asarray(correct_N)
    if correct_N.ndim != 1 or correct_N.dtype != np.bool_:
        raise ValueError(f"correct_N must be booleans (N,), got {correct_N.dtype} {correct_N.shape}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    rng = np.random.default_rng(seed)
    wrong, right = (rng.permutation(np.flatnonzero(part)) for part in (~correct_N, correct_N))
    half = max((count + 1) // 2, count - len(right))
    wrong = wrong[:half]
    return np.concatenate([np.sort(wrong), np.sort(right[: count - len(wrong)])])


def _pixels(images: Images, which: int) -> Pixels:
    pixels = np.asarray(images[which])
    if pixels.dtype != np.uint8 or pixels.shape[2:] not in ((), (3,)) or pixels.ndim < 2 or not pixels.size:
        raise ValueError(f"image {which} must be uint8 (H, W) or (H, W, 3), got {pixels.dtype} {pixels.shape}")
    return pixels


def _empty_sheet(figure: "Figure", rows: int, columns: int) -> "Axes":
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(-(_COLUMN - _IMAGE) / 2 - 0.05, columns * _COLUMN)
    axes.set_ylim(rows * _ROW, -0.08)
    axes.set_aspect("equal")
    axes.set_autoscale_on(False)
    return axes


def _draw(axes: "Axes", row: int, column: int, pixels: Pixels, **frame: Any) -> None:
    """An image in the middle of its square place, its own shape kept, and the frame around the place."""
    from matplotlib.patches import Rectangle

    left, top = column * _COLUMN, row * _ROW
    high, wide = (side / max(pixels.shape[:2]) for side in pixels.shape[:2])
    x, y = left + (_IMAGE - wide) / 2, top + (_IMAGE - high) / 2
    axes.add_patch(Rectangle((left, top), _IMAGE, _IMAGE, facecolor="#f4f5f7", edgecolor="none", zorder=1))
    axes.imshow(pixels, extent=(x, x + wide, y + high, y), cmap="gray", vmin=0, vmax=255, zorder=2)
    axes.add_patch(Rectangle((left, top), _IMAGE, _IMAGE, facecolor="none", zorder=3, clip_on=False, **frame))


def _write(axes: "Axes", row: int, column: int, first: str, second: str, color: str) -> None:
    x, y = column * _COLUMN + _IMAGE / 2, row * _ROW + _IMAGE
    axes.text(x, y + 0.05, first, ha="center", va="top", fontsize=8, color=color, fontweight="bold")
    axes.text(x, y + 0.21, second, ha="center", va="top", fontsize=7, color=INK)

"""The pairs to be measured, laid out as a grid of tiles: of one set with itself, or of queries with a gallery.

Samples are sorted by class, so that pairs of one class meet only in the few tiles near the diagonal. Of one set with
itself, tiles lie over the upper triangle, so that each unordered pair is seen once. The grid depends on the data alone:
every pass over it sees bit-identical similarities, so ties fall the same way, on however many threads and ranks.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias, TypeVar

import numpy as np
import torch

from dml.gather import Group, rank, sum_over_ranks, world
from dml.metrics.inputs import Array, Counts, query_gallery, unit_rows

TILE = 512
"""Rows and columns of a tile, a power of two; fewer for small sets."""
NO_PAIR = -1.25
"""Put in place of the similarity of what is no pair (padding, a pair seen already); no dot product gets there."""

Item = TypeVar("Item")
Position: TypeAlias = tuple[int, int]
"""First row and first column of a tile."""


@dataclass(frozen=True, eq=False)
class Side:
    """One side of the grid: unit rows sorted by class, padded with zero rows to whole tiles."""

    rows_MD: torch.Tensor
    """(M, D), float32 or float64."""
    class_M: torch.Tensor
    """(M,) int64: index into the grid's labels_C, ascending; C for a gallery item of no query's class."""
    n: int
    """Samples, padding left out."""
    tile: int
    """Rows a tile; divides M."""

    @classmethod
    def of(cls, rows_ND: torch.Tensor, class_N: torch.Tensor, tile: int) -> "Side":
        """Sort and pad."""
        n, order_N = len(rows_ND), class_N.argsort(stable=True)
        padded = -(-n // tile) * tile
        rows_MD, class_M = rows_ND.new_zeros(padded, rows_ND.shape[1]), class_N.new_zeros(padded)
        torch.index_select(rows_ND, 0, order_N, out=rows_MD[:n])
        torch.index_select(class_N, 0, order_N, out=class_M[:n])
        return cls(rows_MD, class_M, n, tile)

    def height(self, start: int) -> int:
        """Rows of the tile from `start` on: a power of two, in the last tile the smallest that holds what is left."""
        return min(self.tile, power_of_two(self.n - start))

    @cached_property
    def tile_classes(self) -> list[range]:
        """For each tile, the classes that its samples are of: consecutive, as the rows are sorted."""
        ends = [min(start + self.tile, self.n) - 1 for start in range(0, self.n, self.tile)]
        first, last = self.class_M[: self.n : self.tile].tolist(), self.class_M[ends].tolist()
        return [range(a, b + 1) for a, b in zip(first, last, strict=True)]


@dataclass(frozen=True, eq=False)
class PairGrid:
    """All pairs of a measurement: how many there are of each class, and the tiles that they are computed in."""

    rows: Side
    columns: Side
    """The same object as `rows` where the pairs are those of one set with itself."""
    labels_C: Counts
    """Labels of the classes, ascending: all classes of the set, or of the queries."""
    positives_C: Counts
    """Pairs of two samples of the class; of a query of the class and a gallery item of it."""
    negatives_C: Counts
    """Pairs with exactly one end in the class; of a query of the class and a gallery item of another."""

    @classmethod
    def of(cls, embeddings_ND: Array, labels_N: Array, gallery: tuple[Array, Array] | None = None) -> "PairGrid":
        """Check, normalise and sort.

        Args:
            embeddings_ND: (N, D) floats; the queries, where there is a gallery.
            labels_N: (N,) integers.
            gallery: embeddings (G, D) and labels (G,) to pair every query with; None pairs the set with itself.

        Raises:
            ValueError: see `dml.metrics.inputs.unit_rows` and `query_gallery`.
        """
        if gallery is None:
            rows_ND, labels = unit_rows(embeddings_ND, labels_N)
        else:
            rows_ND, labels, rows_GD, labels_G = query_gallery(embeddings_ND, labels_N, gallery)
        labels_C, class_N, sizes_C = labels.unique(return_inverse=True, return_counts=True)
        sizes, names = sizes_C.cpu().numpy(), labels_C.cpu().numpy()
        if gallery is None:
            rows = Side.of(rows_ND, class_N, _tile(len(rows_ND)))
            return cls(rows, rows, names, sizes * (sizes - 1) // 2, sizes * (rows.n - sizes))
        class_G = torch.searchsorted(labels_C, labels_G)
        class_G[labels_C[class_G.clamp(max=len(names) - 1)] != labels_G] = len(names)
        items = torch.bincount(class_G, minlength=len(names) + 1)[:-1].cpu().numpy()
        tile = _tile(max(len(rows_ND), len(rows_GD)))
        rows, columns = Side.of(rows_ND, class_N, tile), Side.of(rows_GD, class_G, tile)
        return cls(rows, columns, names, sizes * items, sizes * (columns.n - items))

    @property
    def one_set(self) -> bool:
        """Whether the pairs are those of one set with itself; a negative then lies in two classes, else in one."""
        return self.rows is self.columns

    @property
    def device(self) -> torch.device:
        """Where the rows lie and the counting runs."""
        return self.rows.rows_MD.device

    @property
    def tile(self) -> int:
        """Rows and columns of a tile."""
        return self.rows.tile

    @cached_property
    def positives(self) -> int:
        """Pairs of one class."""
        return int(self.positives_C.sum())

    @cached_property
    def negatives(self) -> int:
        """Pairs of two classes."""
        return int(self.negatives_C.sum()) // (2 if self.one_set else 1)

    @cached_property
    def tiles(self) -> list[Position]:
        """Every tile of the grid."""
        size = self.tile
        return [
            (row, column)
            for row in range(0, self.rows.n, size)
            for column in range(row if self.one_set else 0, self.columns.n, size)
        ]

    @cached_property
    def tiles_of_positives(self) -> list[Position]:
        """The tiles that may hold positives, beside negatives: few, as both sides are sorted by class."""
        return [
            (row, column)
            for row, column in self.tiles
            if _meet(self.rows.tile_classes[row // self.tile], self.columns.tile_classes[column // self.tile])
        ]


def _meet(rows: range, columns: range) -> bool:
    return rows[-1] >= columns[0] and columns[-1] >= rows[0]


def power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()


def _tile(n: int) -> int:
    return min(TILE, power_of_two(n))


@dataclass(frozen=True)
class Tile:
    """Similarities of samples from `row` on with those from `column` on, and the classes at both sides."""

    similarity: torch.Tensor
    row: int
    column: int
    row_classes: range
    column_classes: range

    @property
    def mixed(self) -> bool:
        """Whether it may hold positives, beside negatives."""
        return _meet(self.row_classes, self.column_classes)

    def classes(self, grid: PairGrid) -> tuple[torch.Tensor, torch.Tensor]:
        """The class of each of its rows and columns."""
        height, width = self.similarity.shape
        row, column = slice(self.row, self.row + height), slice(self.column, self.column + width)
        return grid.rows.class_M[row], grid.columns.class_M[column]


def similarity_tiles(grid: PairGrid, positions: Iterable[Position]) -> Iterator[Tile]:
    """The tiles at these positions of the grid; each overwrites the one before. All positions give every pair once."""
    size, rows, columns = grid.tile, grid.rows, grid.columns
    buffer = rows.rows_MD.new_empty(size * size)
    seen = torch.ones(size, size, dtype=torch.bool, device=buffer.device).tril()
    for row, column in positions:
        height, width = rows.height(row), columns.height(column)
        similarity = buffer[: height * width].view(height, width)
        torch.mm(rows.rows_MD[row : row + height], columns.rows_MD[column : column + width].T, out=similarity)
        if row + height > rows.n:
            similarity[rows.n - row :] = NO_PAIR
        if column + width > columns.n:
            similarity[:, columns.n - column :] = NO_PAIR
        if grid.one_set and row == column:
            similarity.masked_fill_(seen[:height, :width], NO_PAIR)
        yield Tile(similarity, row, column, rows.tile_classes[row // size], columns.tile_classes[column // size])


def sum_over(
    items: Sequence[Item], work: Callable[[Iterator[Item]], torch.Tensor], device: torch.device, group: Group | None
) -> Counts:
    """The sum of the integers that work(some items) returns: ranks take equal shares, their threads what is next.

    One Python thread for each of torch's: those would meet after each of the many short operations on a tile, and stall
    whenever another process holds a core.

    Args:
        items: the same on every rank.
        work: takes an iterator of items; the sum of its results must not depend on who takes which.
        device: where the work runs; threads share it on CPUs only.
        group: ranks that share the items; each gets the whole sum.
    """
    mine = items[rank(group) :: world(group)]
    threads = min(torch.get_num_threads(), len(mine)) if device.type == "cpu" else 1
    counts = _over_threads(mine, work, threads) if threads > 1 else work(iter(mine))
    return np.asarray(sum_over_ranks(counts, group).cpu().numpy())


def _over_threads(items: Sequence[Item], work: Callable[[Iterator[Item]], torch.Tensor], threads: int) -> torch.Tensor:
    before, shared = torch.get_num_threads(), iter(items)
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            first, *rest = pool.map(work, [shared] * threads)
    finally:
        torch.set_num_threads(before)
    return sum(rest, start=first)

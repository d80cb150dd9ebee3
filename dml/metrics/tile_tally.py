"""Counting the pairs of a tile by class and by the first of several edges that their similarity reaches.

Beside the matrix product this is what curves cost. Only pairs at or above the lowest edge are looked at.
"""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from dml.metrics.inputs import Counts
from dml.metrics.pair_grid import PairGrid, Side, Tile

Int32s: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]

_SLOTS = 1024
_BATCH = 2**17
_TABLE = 2**20


class Bins:
    """The first of the descending edges that a similarity reaches, found without a search; on CPUs.

    The range is cut into equal slots and a table says how many edges lie in the slots below. Edges and values find
    their slot by the same arithmetic, and rounding is monotone; so a value is beyond every edge of a lower slot, short
    of every edge of a higher one, and is compared with those of its own: one, unless edges crowd.

    NumPy computes and compares, torch looks up: each several times as fast as the other on one thread.
    """

    def __init__(self, edges_T: torch.Tensor, most: int) -> None:
        """Take descending edges, and the most values that will be asked for at once."""
        self.work = edges_T.new_empty(most)
        self.slot, self.bin = edges_T.new_empty(2, most, dtype=torch.int32).unbind()
        self.less = np.empty(most, dtype=bool)
        # Scalars of the values' own type, else NumPy would compute in float64.
        self.low, self.top = edges_T.numpy()[-1], edges_T.new_tensor(_SLOTS - 1).numpy()[()]
        width = edges_T.numpy()[0] - self.low
        self.scale = self.top / width if width else width
        slot_T = torch.from_numpy(np.array([int(self._slots(edge)[0]) for edge in edges_T.split(1)]))
        in_slot = torch.bincount(slot_T, minlength=_SLOTS)
        self.first = (len(edges_T) - in_slot.cumsum(0)).to(torch.int32)
        self.edges = edges_T.new_full((int(in_slot.max()), _SLOTS), -torch.inf)
        for slot in in_slot.nonzero().view(-1).tolist():
            inside = edges_T[slot_T == slot]
            self.edges[: len(inside), slot] = inside

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """How many edges are higher than each value, none below the lowest: int32, overwritten by the next call."""
        slot, count = self._slots(values), len(values)
        bin_, work, less = self.bin[:count], self.work[:count], self.less[:count]
        torch.index_select(self.first, 0, slot, out=bin_)
        for edges in self.edges:
            torch.index_select(edges, 0, slot, out=work)
            np.less(values.numpy(), work.numpy(), out=less)
            np.add(bin_.numpy(), less.view(np.int8), out=bin_.numpy())
        return bin_

    def _slots(self, values: torch.Tensor) -> torch.Tensor:
        work, slot = self.work[: len(values)].numpy(), self.slot[: len(values)]
        np.subtract(values.numpy(), self.low, out=work)
        np.multiply(work, self.scale, out=work)
        np.minimum(work, self.top, out=work)
        np.copyto(slot.numpy(), work, casting="unsafe")
        return slot


class TileTally:
    """Counts tile after tile, in plain torch on any device."""

    def __init__(self, grid: PairGrid, edges_T: torch.Tensor) -> None:
        self.grid, self.total = grid, len(edges_T)
        self.low, self.rising_T = edges_T[-1], -edges_T
        # Positives by class, and all pairs by the class of either end: so negatives need not be told apart one by one.
        self.positives, self.ends = grid.rows.class_M.new_zeros(2, len(grid.labels_C), self.total)

    def add(self, tile: Tile) -> None:
        """Count the pairs of a tile."""
        row, column = (tile.similarity >= self.low).nonzero(as_tuple=True)
        bin_ = torch.searchsorted(self.rising_T, -tile.similarity[row, column])
        row_class, column_class = (
            class_of[at] for class_of, at in zip(tile.classes(self.grid), (row, column), strict=True)
        )
        self._count(self.ends, row_class, bin_)
        if self.grid.one_set:
            self._count(self.ends, column_class, bin_)
        same = row_class == column_class
        self._count(self.positives, row_class[same], bin_[same])

    def _count(self, table_CT: torch.Tensor, class_: torch.Tensor, bin_: torch.Tensor) -> None:
        table_CT.view(-1).scatter_add_(0, class_ * self.total + bin_, torch.ones_like(bin_))

    def counts(self) -> torch.Tensor:
        """(2, C, T) int64: positives and negatives by the first edge that they reach, each negative at either end."""
        own = 2 if self.grid.one_set else 1
        return torch.stack([self.positives, self.ends - own * self.positives])


@dataclass(frozen=True)
class _Part:
    """Where a tile lies in a batch."""

    tile: Tile
    found: slice
    row_table: slice
    column_table: slice


class TileTallyOnCPU(TileTally):
    """The same on one thread of a CPU, where the plain form would take several times as long as the matrix product.

    What is found in tiles is gathered until it is worth a batch, since a call that has fallen out of the cache costs as
    much as counting thousands of pairs. Classes of a tile are few: a table of these alone stays in the cache.
    """

    def __init__(self, grid: PairGrid, edges_T: torch.Tensor) -> None:
        super().__init__(grid, edges_T)
        self.pairs, most = grid.tile**2, grid.tile**2 + _BATCH
        # NumPy finds the set bytes of a mask at one steady speed if more than a tenth of them are set, and at half of
        # it just below, where FAR bounds like to be. So the mask ends in set bytes, which are cut off from the answer.
        self.padding = self.pairs // 16
        self.mask = np.ones(self.pairs + self.padding, dtype=bool)
        self.bins, self.values = Bins(edges_T, most), edges_T.new_empty(most).numpy()
        self.row_key, self.column_key = np.empty((2, most), dtype=np.int32)
        self.row = np.empty(self.pairs, dtype=np.int64)
        self.row_start, self.column_start = (self._starts(side) for side in (grid.rows, grid.columns))
        self.batch: list[_Part] = []

    def _starts(self, side: Side) -> Int32s:
        """Where each sample's class begins in a table of the classes of its tile."""
        first = torch.tensor([classes[0] for classes in side.tile_classes]).repeat_interleave(side.tile)
        return ((side.class_M - first) * self.total).to(torch.int32).numpy()

    def add(self, tile: Tile) -> None:
        """Find the pairs of a tile that reach an edge; they are counted with their batch."""
        flat, width = tile.similarity.view(-1).numpy(), tile.similarity.shape[1]
        mask = self.mask[self.pairs - len(flat) :]
        np.greater_equal(flat, self.bins.low, out=mask[: len(flat)])
        at = np.flatnonzero(mask)[: -self.padding or None]
        part = self._part(tile, len(at))
        np.take(flat, at, out=self.values[part.found], mode="clip")
        height, row = len(flat) // width, self.row[: len(at)]
        rows = self.row_start[tile.row : tile.row + height] + np.int32(part.row_table.start)
        columns = self.column_start[tile.column : tile.column + width] + np.int32(part.column_table.start)
        # A tile's width is a power of two.
        np.right_shift(at, width.bit_length() - 1, out=row)
        np.take(rows, row, out=self.row_key[part.found], mode="clip")
        np.bitwise_and(at, width - 1, out=at)
        np.take(columns, at, out=self.column_key[part.found], mode="clip")
        self.batch.append(part)
        # Tables grow by every tile, however few pairs are found in it.
        if part.found.stop >= _BATCH or max(part.row_table.stop, part.column_table.stop) >= _TABLE:
            self._count_batch()

    def _part(self, tile: Tile, found: int) -> _Part:
        ends = [0, 0, 0]
        if self.batch:
            ends = [x.stop for x in (self.batch[-1].found, self.batch[-1].row_table, self.batch[-1].column_table)]
        sizes = found, len(tile.row_classes) * self.total, len(tile.column_classes) * self.total
        return _Part(tile, *(slice(end, end + size) for end, size in zip(ends, sizes, strict=True)))

    def _count_batch(self) -> None:
        last = self.batch[-1]
        bin_ = self.bins(torch.from_numpy(self.values[: last.found.stop])).numpy()
        for part in self.batch:
            if part.tile.mixed:
                self._count_positives(part, bin_[part.found])
        rows = self._table(self.row_key, bin_, last.row_table.stop)
        for part in self.batch:
            self._add_to(self.ends, part.tile.row_classes, rows[part.row_table])
        if self.grid.one_set:
            columns = self._table(self.column_key, bin_, last.column_table.stop)
            for part in self.batch:
                self._add_to(self.ends, part.tile.column_classes, columns[part.column_table])
        self.batch.clear()

    def _count_positives(self, part: _Part, bin_: Int32s) -> None:
        row_classes, column_classes = part.tile.row_classes, part.tile.column_classes
        # The same class, so the same place but for where the tables of the two sides begin.
        shift = (column_classes[0] - row_classes[0]) * self.total + part.row_table.start - part.column_table.start
        row_key = self.row_key[part.found]
        same = np.flatnonzero(row_key == self.column_key[part.found] + shift)
        key = row_key[same] + bin_[same] - part.row_table.start
        self._add_to(self.positives, row_classes, np.bincount(key, minlength=len(row_classes) * self.total))

    def _table(self, key: Int32s, bin_: Int32s, size: int) -> Counts:
        np.add(key[: len(bin_)], bin_, out=key[: len(bin_)])
        return np.asarray(torch.bincount(torch.from_numpy(key[: len(bin_)]), minlength=size).numpy())

    def _add_to(self, table_CT: torch.Tensor, classes: range, counts: Counts) -> None:
        inside = table_CT.numpy()[classes[0] : classes[-1] + 1]
        np.add(inside, counts.reshape(inside.shape), out=inside)

    def counts(self) -> torch.Tensor:
        """See `TileTally.counts`."""
        if self.batch:
            self._count_batch()
        return super().counts()

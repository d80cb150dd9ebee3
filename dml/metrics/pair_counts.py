"""Counting pairs by similarity: every unordered pair once, tile by tile, in memory that does not grow with N^2.

Rows are sorted by class, so that pairs of one class meet only in the few tiles near the diagonal. Tiles lie on one
global grid over the upper triangle; each pass over them sees bit-identical similarities, so ties fall the same way.

Similarities are compared on a grid: cells of width 2^-20 (1e-6, a few times the rounding error of a float32 dot
product), centred on its multiples so that 1, 0.5 or 0 lie in the middle of a cell. Pairs in one cell are ties.
Calibrated thresholds stand on the edges between cells, where rounding cannot push a tied pair across.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from dml.metrics.inputs import Array, Counts, Floats, unit_rows

TILE = 512
"""Rows and columns of a tile, a power of two; fewer for small sets."""
BLOCK = 64
"""Rows and columns of a block of the calibration sample."""
CELLS_PER_UNIT = 2**20
"""Cells in a similarity difference of 1."""

# A dot product of unit rows never gets here; what is no pair (padding, a pair seen already) is moved to this value.
_NO_PAIR = -1.25
_ZERO_CELL = int(-_NO_PAIR * CELLS_PER_UNIT)
_SLOTS = 4096
_MEETINGS = 256


@dataclass(frozen=True)
class SortedRows:
    """Unit rows sorted by class and padded with zero rows to whole tiles."""

    rows_MD: torch.Tensor
    class_M: torch.Tensor
    labels_C: torch.Tensor
    sizes_C: torch.Tensor
    tile: int

    @classmethod
    def of(cls, embeddings_ND: Array, labels_N: Array) -> "SortedRows":
        """Check, normalise and sort; raises what `unit_rows` raises."""
        rows_ND, labels = unit_rows(embeddings_ND, labels_N)
        labels_C, class_N, sizes_C = labels.unique(return_inverse=True, return_counts=True)
        order_N = class_N.argsort(stable=True)
        n = len(order_N)
        tile = min(TILE, 1 << (n - 1).bit_length())
        padded = -(-n // tile) * tile
        rows_MD, class_M = rows_ND.new_zeros(padded, rows_ND.shape[1]), class_N.new_zeros(padded)
        torch.index_select(rows_ND, 0, order_N, out=rows_MD[:n])
        torch.index_select(class_N, 0, order_N, out=class_M[:n])
        return cls(rows_MD, class_M, labels_C, sizes_C, tile)

    @cached_property
    def n(self) -> int:
        """Samples, padding left out."""
        return int(self.sizes_C.sum())

    @cached_property
    def positives(self) -> int:
        """Unordered pairs of one class."""
        return int((self.sizes_C * (self.sizes_C - 1) // 2).sum())

    @cached_property
    def negatives(self) -> int:
        """Unordered pairs of two classes."""
        return self.n * (self.n - 1) // 2 - self.positives

    @cached_property
    def tile_classes(self) -> list[range]:
        """For each tile of rows, the classes that its samples are of: consecutive, as the rows are sorted."""
        first = self.class_M[: self.n : self.tile].tolist()
        last = [*self.class_M[self.tile - 1 : self.n - 1 : self.tile].tolist(), len(self.sizes_C) - 1]
        return [range(a, b + 1) for a, b in zip(first, last, strict=True)]


@dataclass(frozen=True)
class Tile:
    """Similarities of a tile of samples from `row` on with one from `column` on, and the classes at both sides."""

    similarity: torch.Tensor
    row: int
    column: int
    row_classes: range
    column_classes: range

    @property
    def mixed(self) -> bool:
        """Whether it holds positives, beside negatives."""
        return self.row_classes[-1] >= self.column_classes[0]


def similarity_tiles(rows: SortedRows, part: int = 0, parts: int = 1) -> Iterator[Tile]:
    """Every unordered pair of two samples once, or one of several equal parts; each tile overwrites the one before."""
    n, size = rows.n, rows.tile
    similarity = rows.rows_MD.new_empty(size, size)
    seen = torch.ones(size, size, dtype=torch.bool, device=similarity.device).tril()
    grid = [(row, column) for row in range(0, n, size) for column in range(row, n, size)]
    for row, column in grid[part::parts]:
        torch.mm(rows.rows_MD[row : row + size], rows.rows_MD[column : column + size].T, out=similarity)
        similarity[n - row :] = _NO_PAIR
        similarity[:, n - column :] = _NO_PAIR
        if row == column:
            similarity.masked_fill_(seen, _NO_PAIR)
        yield Tile(similarity, row, column, rows.tile_classes[row // size], rows.tile_classes[column // size])


def _sum_of_parts(rows: SortedRows, work: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
    """The sum of work(part, parts) over as many parts as torch has threads; one for a set of one tile.

    One thread a part: torch's own threads would meet after each of the many short operations on a tile, and stall
    whenever another process holds a core.
    """
    threads = torch.get_num_threads()
    if threads == 1 or rows.rows_MD.device.type != "cpu" or rows.n <= rows.tile:
        return work(0, 1)
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            first, *rest = pool.map(lambda part: work(part, threads), range(threads))
    finally:
        torch.set_num_threads(threads)
    return sum(rest, start=first)


def similarity_histograms(rows: SortedRows) -> Counts:
    """All positives (row 0) and all negatives (row 1) by cell of similarity, ascending; see `cell_edge`."""

    def work(part: int, parts: int) -> torch.Tensor:
        counts = torch.zeros(2, 2 * _ZERO_CELL + 1, dtype=torch.int64, device=rows.rows_MD.device)
        for tile in similarity_tiles(rows, part, parts):
            similarity = tile.similarity
            if tile.mixed:
                same = rows.class_M[tile.row :][: rows.tile, None] == rows.class_M[tile.column :][: rows.tile]
                _add_cells(counts[0], similarity[same])
                similarity.masked_fill_(same, _NO_PAIR)
            _add_cells(counts[1], similarity)
        return counts

    return _pairs_only(_sum_of_parts(rows, work))


def sampled_negatives_histogram(rows: SortedRows, about: int, seed: int = 0) -> Counts:
    """The negatives by cell, of a seeded sample of about that many (a little more; all but a few if there are no more).

    Samples are shuffled and cut into blocks, and block i meets block i + shift for one shift after the other: every
    sample takes part equally often, which keeps the error near that of as many independent pairs.
    """
    rng = np.random.default_rng(seed)
    count = rows.n // BLOCK
    order = torch.from_numpy(rng.permutation(rows.n)[: count * BLOCK]).to(rows.rows_MD.device)
    blocks, classes = rows.rows_MD[order].view(count, BLOCK, -1), rows.class_M[order].view(count, BLOCK)
    meetings = _meetings(count, rng.permutation(np.arange(1, (count + 1) // 2)).tolist())
    negatives_in_block = BLOCK**2 * rows.negatives / (rows.negatives + rows.positives)
    needed = math.ceil(1.01 * about / negatives_in_block)
    chosen = list(itertools.takewhile(lambda meeting: meeting[3] < needed, meetings))

    def work(part: int, parts: int) -> torch.Tensor:
        counts = torch.zeros(2 * _ZERO_CELL + 1, dtype=torch.int64, device=blocks.device)
        for start, stop, offset, _ in chosen[part::parts]:
            i, j = slice(start, stop), slice(start + offset, stop + offset)
            similarity = blocks[i] @ blocks[j].transpose(1, 2)
            same = classes[i, :, None] == classes[j, None, :]
            _add_cells(counts, similarity.masked_fill_(same, _NO_PAIR))
        return counts

    return _pairs_only(_sum_of_parts(rows, work))


def _meetings(count: int, shifts: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """Runs of blocks start..stop that meet the blocks `offset` further on, and how many pairs of blocks came before."""
    before, chunk = 0, _MEETINGS
    for shift in shifts:
        for low, high, offset in ((0, count - shift, shift), (count - shift, count, shift - count)):
            for start in range(low, high, chunk):
                stop = min(start + chunk, high)
                yield start, stop, offset, before
                before += stop - start


def cell_edge(cell: int) -> float:
    """The similarity at which a cell of a histogram begins; exact in float32."""
    return (cell - _ZERO_CELL - 0.5) / CELLS_PER_UNIT


def _add_cells(counts: torch.Tensor, similarity: torch.Tensor) -> None:
    # Half cells first: scaling by a power of two and rounding down are exact, so no value lands beyond an edge.
    half = (similarity.reshape(-1) * (2 * CELLS_PER_UNIT)).floor_().to(torch.int64)
    cell = half.add_(2 * _ZERO_CELL + 1).bitwise_right_shift_(1)
    counts.scatter_add_(0, cell, torch.ones_like(cell))


def _pairs_only(counts: torch.Tensor) -> Counts:
    counts[..., 0] = 0  # where _NO_PAIR went
    return counts.cpu().numpy()


def count_accepted(rows: SortedRows, edges_T: Floats) -> Counts:
    """Per class, the positives (row 0) and the negatives (row 1) with a similarity at or above each edge.

    Args:
        rows: all samples.
        edges_T: similarities, descending.

    Returns:
        (2, C, T) int64, all classes. A negative counts in both its classes.
    """
    bins = _Bins(torch.from_numpy(edges_T).to(rows.rows_MD))
    shift, size = rows.tile.bit_length() - 1, rows.tile

    def work(part: int, parts: int) -> torch.Tensor:
        counts = rows.class_M.new_zeros(2, len(rows.sizes_C), len(edges_T))
        find = _Finder(size)
        for tile in similarity_tiles(rows, part, parts):
            at = find(tile.similarity, bins.low)
            bin_ = bins(tile.similarity.view(-1).index_select(0, at))
            row, column = at >> shift, at & (size - 1)
            row_class, column_class = rows.class_M[tile.row :][:size], rows.class_M[tile.column :][:size]
            if tile.mixed:
                same = row_class[row] == column_class[column]
                _tally(counts[0], tile.row_classes, row_class, row[same], bin_[same])
                row, column, bin_ = (x[~same] for x in (row, column, bin_))
            _tally(counts[1], tile.row_classes, row_class, row, bin_)
            _tally(counts[1], tile.column_classes, column_class, column, bin_)
        return counts

    return _sum_of_parts(rows, work).cumsum(2).cpu().numpy()


class _Finder:
    """Finds where the similarities of a tile reach an edge.

    On CPUs by NumPy, which compares to a mask, and finds the set bytes of a mask, several times as fast as a thread of
    torch: at one steady speed if more than a tenth of them are set, and at half of it just below, where FAR bounds like
    to be. So the mask ends in an eighth of set bytes, which are cut off from the answer.
    """

    def __init__(self, size: int) -> None:
        self.pairs = size * size
        self.padding = self.pairs // 8
        self.mask = np.ones(self.pairs + self.padding, dtype=bool)

    def __call__(self, similarity: torch.Tensor, edge: float) -> torch.Tensor:
        flat = similarity.view(-1)
        if flat.device.type != "cpu":
            return (flat >= edge).nonzero().view(-1)
        np.greater_equal(flat.numpy(), edge, out=self.mask[: self.pairs])
        found = np.flatnonzero(self.mask)
        return torch.from_numpy(found[: len(found) - self.padding])


def _tally(
    table_CT: torch.Tensor, classes: range, class_of: torch.Tensor, sample: torch.Tensor, bin_: torch.Tensor
) -> None:
    # The classes of a tile are few: a table of these alone stays in the cache.
    total = table_CT.shape[1]
    start_of = ((class_of - classes[0]) * total).to(torch.int32)
    counts = torch.bincount(start_of.index_select(0, sample).add_(bin_), minlength=len(classes) * total)
    table_CT[classes[0] : classes[-1] + 1] += counts.view(len(classes), total)


class _Bins:
    """The first of the descending edges that a similarity reaches, found without a search.

    The range is cut into equal slots and a table says how many edges lie in the slots below. Edges and values find
    their slot by the same arithmetic, and rounding is monotone; so a value is beyond every edge of a lower slot, short
    of every edge of a higher one, and is compared with those of its own: one, unless edges crowd.
    """

    def __init__(self, edges_T: torch.Tensor) -> None:
        self.low = float(edges_T[-1])
        width = float(edges_T[0]) - self.low
        self.scale = (_SLOTS - 1) / width if width else 0.0
        slot_T = self._slot(edges_T)
        in_slot = torch.bincount(slot_T, minlength=_SLOTS)
        self.first = (len(edges_T) - in_slot.cumsum(0)).to(torch.int32)
        self.edges = edges_T.new_full((int(in_slot.max()), _SLOTS), -torch.inf)
        for slot in in_slot.nonzero().view(-1).tolist():
            inside = edges_T[slot_T == slot]
            self.edges[: len(inside), slot] = inside

    def __call__(self, similarity: torch.Tensor) -> torch.Tensor:
        slot = self._slot(similarity)
        first = self.first.index_select(0, slot)
        for edges in self.edges:
            first.add_(similarity < edges.index_select(0, slot))
        return first

    def _slot(self, similarity: torch.Tensor) -> torch.Tensor:
        return (similarity - self.low).mul_(self.scale).clamp_(max=_SLOTS - 1).to(torch.int64)

"""Counting pairs by similarity: every pair once, tile by tile, in memory that does not grow with N^2.

Similarities are compared on a grid: cells of width 2^-20 (1e-6, a few times the rounding error of a float32 dot
product), centred on its multiples so that 1, 0.5 or 0 lie in the middle of a cell. Pairs in one cell are ties.
Calibrated thresholds stand on the edges between cells, where rounding cannot push a tied pair across.
"""

import math
from collections.abc import Iterator

import torch

from dml.gather import Group
from dml.metrics.inputs import Counts, Floats
from dml.metrics.pair_grid import NO_PAIR, PairGrid, Position, Tile, similarity_tiles, sum_over
from dml.metrics.tile_tally import TileTally, TileTallyOnCPU

__all__ = [
    "CELLS_PER_UNIT",
    "PairGrid",
    "cell_edge",
    "cell_of",
    "count_accepted",
    "positives_histogram",
    "similarity_histograms",
]

CELLS_PER_UNIT = 2**20
"""Cells in a similarity difference of 1."""

CELLS = 2 * int(-NO_PAIR * CELLS_PER_UNIT) + 1
"""Cells of a histogram; what is no pair falls into the first, which is emptied."""

_ZERO_CELL = int(-NO_PAIR * CELLS_PER_UNIT)


def similarity_histograms(grid: PairGrid, group: Group | None = None) -> Counts:
    """All positives (row 0) and all negatives (row 1) by cell of similarity, ascending; see `cell_edge`.

    Args:
        grid: all pairs; the same on every rank.
        group: ranks that share the tiles; each gets all counts.

    Returns:
        (2, cells) int64.
    """

    def work(positions: Iterator[Position]) -> torch.Tensor:
        counts = _no_counts(grid, 2)
        for tile in similarity_tiles(grid, positions):
            similarity = tile.similarity
            if tile.mixed:
                same = _same_class(grid, tile)
                _add_cells(counts[0], similarity[same])
                similarity.masked_fill_(same, NO_PAIR)
            _add_cells(counts[1], similarity)
        return counts

    return pairs_only(sum_over(grid.tiles, work, grid.device, group))


def positives_histogram(grid: PairGrid, group: Group | None = None) -> Counts:
    """All positives by cell of similarity: (cells,) int64. Only the tiles that may hold one are computed."""

    def work(positions: Iterator[Position]) -> torch.Tensor:
        counts = _no_counts(grid)
        for tile in similarity_tiles(grid, positions):
            _add_cells(counts, tile.similarity[_same_class(grid, tile)])
        return counts

    return pairs_only(sum_over(grid.tiles_of_positives, work, grid.device, group))


def cell_edge(cell: int) -> float:
    """The similarity at which a cell of a histogram begins; exact in float32."""
    return (cell - _ZERO_CELL - 0.5) / CELLS_PER_UNIT


def cell_of(similarity: float) -> int:
    """The cell of a histogram that a similarity lies in."""
    return math.floor(similarity * CELLS_PER_UNIT + 0.5) + _ZERO_CELL


def cells(similarity: torch.Tensor) -> torch.Tensor:
    """The cell of each similarity: int32, flat."""
    # Half cells first: scaling by a power of two and rounding down are exact, so no value lands beyond an edge.
    half = (similarity.reshape(-1) * (2 * CELLS_PER_UNIT)).floor_().to(torch.int32)
    return half.add_(2 * _ZERO_CELL + 1).bitwise_right_shift_(1)


def pairs_only(counts: Counts) -> Counts:
    """Histograms without what is no pair; emptied in place."""
    counts[..., 0] = 0
    return counts


def _no_counts(grid: PairGrid, *kinds: int) -> torch.Tensor:
    return torch.zeros(*kinds, CELLS, dtype=torch.int64, device=grid.device)


def _add_cells(counts: torch.Tensor, similarity: torch.Tensor) -> None:
    cell = cells(similarity).to(torch.int64)
    counts.scatter_add_(0, cell, torch.ones_like(cell))


def _same_class(grid: PairGrid, tile: Tile) -> torch.Tensor:
    row_class, column_class = tile.classes(grid)
    return row_class[:, None] == column_class


def count_accepted(grid: PairGrid, edges_T: Floats, group: Group | None = None) -> Counts:
    """Per class, the positives (row 0) and the negatives (row 1) with a similarity at or above each edge.

    Args:
        grid: all pairs; the same on every rank.
        edges_T: similarities, descending.
        group: ranks that share the tiles; each gets all counts.

    Returns:
        (2, C, T) int64, all classes of the grid. A negative counts in both its classes, in query/gallery form in the
        query's alone.
    """
    edges = torch.from_numpy(edges_T).to(grid.rows.rows_MD)

    def work(positions: Iterator[Position]) -> torch.Tensor:
        tally = (TileTallyOnCPU if grid.device.type == "cpu" else TileTally)(grid, edges)
        for tile in similarity_tiles(grid, positions):
            tally.add(tile)
        return tally.counts()

    return sum_over(grid.tiles, work, grid.device, group).cumsum(2)

"""A seeded sample of the negatives, for thresholds that need not be placed by all of them."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
import torch

from dml.gather import Group
from dml.metrics.inputs import Counts
from dml.metrics.pair_counts import CELLS, cell_edge, cell_of, cells
from dml.metrics.pair_grid import NO_PAIR, PairGrid, Side, sum_over

BLOCK = 128
"""Rows and columns of a block of the sample; fewer for small sets, so that there are blocks to choose from."""

Run: TypeAlias = tuple[slice, slice]
"""Blocks of rows, and the blocks of columns that they meet one by one."""

_BLOCKS_AT_LEAST = 16
_RUN = 8
_LOOKS = 4
_LOWEST = 1


def sampled_negatives(
    grid: PairGrid, about: int, *, far: float = 1.0, seed: int = 0, group: Group | None = None
) -> Counts:
    """The negatives by cell, of a seeded sample of about that many (a little more; all but a few if there are no more).

    Samples of either side are shuffled and cut into blocks, and block i meets block i + shift for one shift after the
    other: every sample takes part equally often, which keeps the error near that of as many independent pairs.

    Args:
        grid: all pairs; the same on every rank.
        about: negatives to look at.
        far: the share of the nearest negatives that matters. Farther ones may be counted in the lowest cell together,
            which is several times as fast where the share is small.
        seed: of the shuffles.
        group: ranks that share the work; each gets all counts.

    Returns:
        (cells,) int64, see `dml.metrics.pair_counts.cell_edge`.
    """
    sample = _Sample.of(grid, about, np.random.default_rng(seed))
    lowest = [_LOWEST]
    if far < 0.5:
        lowest.insert(0, _cell_of_share(sample.first_look(), 1.25 * far))
    for cell in lowest:
        farther, *_ = found = sum_over(sample.runs, partial(sample.histogram, lowest=cell), grid.device, group)
        if found.sum() - farther >= far * found.sum():
            break
    counts = np.zeros(CELLS, dtype=np.int64)
    counts[cell:] = found[1:]
    counts[_LOWEST] += farther
    return counts


def _cell_of_share(similarity: torch.Tensor, share: float) -> int:
    """The cell from which on this share of the similarities lie, or a little more."""
    place = int((1 - share) * len(similarity))
    return max(_LOWEST, cell_of(float(np.partition(similarity.cpu().numpy(), place)[place])))


@dataclass(frozen=True, eq=False)
class _Sample:
    rows: torch.Tensor
    """(blocks, BLOCK, D) of shuffled samples."""
    row_class: torch.Tensor
    columns: torch.Tensor
    column_class: torch.Tensor
    runs: list[Run]

    @classmethod
    def of(cls, grid: PairGrid, about: int, rng: np.random.Generator) -> "_Sample":
        rows, row_class = _blocks(grid.rows, rng)
        columns, column_class = (rows, row_class) if grid.one_set else _blocks(grid.columns, rng)
        shifts = np.arange(1, (len(rows) + 1) // 2) if grid.one_set else np.arange(len(columns))
        runs = _runs(len(rows), len(columns), rng.permutation(shifts).tolist())
        pairs = row_class[0].numel() * column_class[0].numel()
        needed = math.ceil(1.01 * about / (pairs * grid.negatives / (grid.negatives + grid.positives)))
        chosen = [run for run, before in itertools.takewhile(lambda found: found[1] < needed, runs)]
        return cls(rows, row_class, columns, column_class, chosen)

    def first_look(self) -> torch.Tensor:
        """The negatives' similarities, flat, in a few runs; every rank makes it for itself, and the same."""
        few = self.runs[:: math.ceil(len(self.runs) / _LOOKS)]
        looked = torch.cat([similarity.view(-1) for similarity, _ in self._similarities(iter(few))])
        return _from(looked, cell_edge(_LOWEST))

    def histogram(self, runs: Iterator[Run], lowest: int) -> torch.Tensor:
        """Negatives below a cell (place 0), and by cell from there on: (1 + cells left,) int64."""
        found, negatives, edge = [self.row_class.new_empty(0)], 0, cell_edge(lowest)
        for similarity, same in self._similarities(runs):
            found.append(cells(_from(similarity.view(-1), edge)))
            negatives += same.numel() - int(same.count_nonzero())
        near = torch.cat(found)
        counts = torch.bincount(near.sub_(lowest - 1), minlength=1 + CELLS - lowest)
        counts[0] = negatives - len(near)
        return counts

    def _similarities(self, runs: Iterator[Run]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The similarities in each run, NO_PAIR of positives, and which are positives."""
        for i, j in runs:
            same = self.row_class[i, :, None] == self.column_class[j, None, :]
            yield (self.rows[i] @ self.columns[j].transpose(1, 2)).masked_fill_(same, NO_PAIR), same


def _from(similarity: torch.Tensor, edge: float) -> torch.Tensor:
    # On CPUs NumPy is several times as fast.
    if similarity.device.type != "cpu":
        return similarity[similarity >= edge]
    return similarity.index_select(0, torch.from_numpy(np.flatnonzero(similarity.numpy() >= edge)))


def _blocks(side: Side, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    size = min(BLOCK, -(-side.n // _BLOCKS_AT_LEAST))
    count = side.n // size
    order = torch.from_numpy(rng.permutation(side.n)[: count * size]).to(side.rows_MD.device)
    return side.rows_MD[order].view(count, size, -1), side.class_M[order].to(torch.int32).view(count, size)


def _runs(rows: int, columns: int, shifts: list[int]) -> Iterator[tuple[Run, int]]:
    """Runs of blocks, and how many pairs of blocks came before."""
    before = 0
    for shift in shifts:
        start = 0
        while start < rows:
            other = (start + shift) % columns
            length = min(_RUN, rows - start, columns - other)
            yield (slice(start, start + length), slice(other, other + length)), before
            before, start = before + length, start + length

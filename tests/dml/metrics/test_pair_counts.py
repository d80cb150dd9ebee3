"""The streaming counts beneath the curves: cells, bins and edges that no rounding moves."""

import numpy as np
import pytest
import torch

from dml.metrics import pair_counts
from dml.metrics.pair_counts import CELLS_PER_UNIT, SortedRows, cell_edge, count_accepted, similarity_histograms


def random_set(n=300, classes=20, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 6)).astype(dtype), rng.integers(0, classes, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "edges",
    [
        np.linspace(0.9, 0.1, 101),
        1 - np.linspace(1e-3, 1.2, 101) ** 2 / 2,
        np.array([0.5, 0.5, 0.5]),
        np.array([0.9, 0.5 + 1e-7, 0.5 + 5e-8, 0.5, 0.1]),
        np.array([1.0, 1 - 1e-7]),
    ],
)
def test_bins_agree_with_a_search_also_at_the_edges(edges, dtype):
    edges_T = torch.from_numpy(edges).to(dtype)
    near = [edges_T, *(torch.nextafter(edges_T, edges_T.new_tensor(x)) for x in (2.0, -2.0))]
    values = torch.cat([*near, torch.linspace(-1, 1, 5001, dtype=dtype)])
    values = values[values >= edges_T[-1]]
    found = pair_counts._Bins(edges_T)(values)
    expected = (values[:, None] < edges_T[None]).sum(1)
    assert found.tolist() == expected.tolist()


def test_histogram_and_counts_agree_at_every_cell_edge():
    rows = SortedRows.of(*random_set())
    positives, negatives = similarity_histograms(rows)
    assert positives.sum() == rows.positives
    assert negatives.sum() == rows.negatives
    cells = negatives.nonzero()[0][::-1][:200]
    accepted = count_accepted(rows, np.array([cell_edge(int(cell)) for cell in cells]))
    assert accepted[0].sum(0).tolist() == [positives[cell:].sum() for cell in cells]
    assert accepted[1].sum(0).tolist() == [2 * negatives[cell:].sum() for cell in cells]


def test_cells_are_centred_on_round_similarities():
    rows = SortedRows.of(np.array([[1, 0.0], [1, 0], [0, 1], [-1, 0]]), np.array([0, 1, 2, 2]))
    occupied = similarity_histograms(rows)[1].nonzero()[0]
    centres = [cell_edge(int(cell)) + 0.5 / CELLS_PER_UNIT for cell in occupied]
    assert centres == [-1.0, 0.0, 1.0]


def test_every_pair_is_seen_once(monkeypatch):
    monkeypatch.setattr(pair_counts, "TILE", 8)
    rows = SortedRows.of(*random_set(n=43, classes=5))
    seen = []
    for tile in pair_counts.similarity_tiles(rows):
        at = (tile.similarity > -1.2).nonzero()
        seen += [(tile.row + i, tile.column + j) for i, j in at.tolist()]
    assert sorted(seen) == [(i, j) for i in range(43) for j in range(i + 1, 43)]


def test_parts_of_the_grid_share_out_all_tiles(monkeypatch):
    monkeypatch.setattr(pair_counts, "TILE", 8)
    rows = SortedRows.of(*random_set(n=43, classes=5))
    whole = {(tile.row, tile.column) for tile in pair_counts.similarity_tiles(rows)}
    parts = [[(tile.row, tile.column) for tile in pair_counts.similarity_tiles(rows, part, 4)] for part in range(4)]
    assert sum(map(len, parts)) == len(whole)
    assert set().union(*parts) == whole


@pytest.mark.parametrize("n", [256, 300])
def test_the_sample_is_of_negatives_and_seeded(n):
    rows = SortedRows.of(*random_set(n=n))
    every = similarity_histograms(rows)[1]
    some, again, other = (pair_counts.sampled_negatives_histogram(rows, 6000, seed) for seed in (0, 0, 1))
    assert 6000 <= some.sum() < every.sum()
    assert (some == again).all()
    assert (some != other).any()
    beyond = pair_counts.sampled_negatives_histogram(rows, 10**9)
    assert beyond.sum() <= every.sum()

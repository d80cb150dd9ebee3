"""The streaming counts beneath the curves: cells, bins and edges that no rounding moves."""

import numpy as np
import pytest
import torch

from dml.metrics import pair_grid, pair_sample, tile_tally
from dml.metrics.pair_counts import (
    CELLS,
    CELLS_PER_UNIT,
    PairGrid,
    cell_edge,
    cell_of,
    count_accepted,
    positives_histogram,
    similarity_histograms,
)
from dml.metrics.pair_sample import sampled_negatives
from dml.metrics.tile_tally import Bins, TileTally, TileTallyOnCPU


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
    found = Bins(edges_T, len(values))(values)
    expected = (values[:, None] < edges_T[None]).sum(1)
    assert found.tolist() == expected.tolist()


def test_histogram_and_counts_agree_at_every_cell_edge():
    rows = PairGrid.of(*random_set())
    positives, negatives = similarity_histograms(rows)
    assert positives.sum() == rows.positives
    assert negatives.sum() == rows.negatives
    cells = negatives.nonzero()[0][::-1][:200]
    accepted = count_accepted(rows, np.array([cell_edge(int(cell)) for cell in cells]))
    assert accepted[0].sum(0).tolist() == [positives[cell:].sum() for cell in cells]
    assert accepted[1].sum(0).tolist() == [2 * negatives[cell:].sum() for cell in cells]


def test_cells_are_centred_on_round_similarities():
    rows = PairGrid.of(np.array([[1, 0.0], [1, 0], [0, 1], [-1, 0]]), np.array([0, 1, 2, 2]))
    occupied = similarity_histograms(rows)[1].nonzero()[0]
    centres = [cell_edge(int(cell)) + 0.5 / CELLS_PER_UNIT for cell in occupied]
    assert centres == [-1.0, 0.0, 1.0]


def test_every_pair_is_seen_once(monkeypatch):
    monkeypatch.setattr(pair_grid, "TILE", 8)
    rows = PairGrid.of(*random_set(n=43, classes=5))
    seen = []
    for tile in pair_grid.similarity_tiles(rows, rows.tiles):
        at = (tile.similarity > -1.2).nonzero()
        seen += [(tile.row + i, tile.column + j) for i, j in at.tolist()]
    assert sorted(seen) == [(i, j) for i in range(43) for j in range(i + 1, 43)]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_out_all_tiles(threads, monkeypatch):
    monkeypatch.setattr(pair_grid, "TILE", 8)
    grid = PairGrid.of(*random_set(n=43, classes=5))
    taken = []

    def work(positions):
        mine = list(positions)
        taken.append(mine)
        return torch.tensor(len(mine))

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert pair_grid.sum_over(grid.tiles, work, grid.device, None) == len(grid.tiles)
    finally:
        torch.set_num_threads(before)
    assert len(taken) == threads
    assert sorted(position for mine in taken for position in mine) == grid.tiles


@pytest.mark.parametrize("n", [256, 300])
def test_the_sample_is_of_negatives_and_seeded(n):
    grid = PairGrid.of(*random_set(n=n))
    every = similarity_histograms(grid)[1]
    some, again, other = (sampled_negatives(grid, 6000, seed=seed) for seed in (0, 0, 1))
    assert 6000 <= some.sum() < every.sum()
    assert (some == again).all()
    assert (some != other).any()
    assert sampled_negatives(grid, 10**9).sum() <= every.sum()


def queries_and_gallery(queries=130, items=3000, seed=0):
    (rows, labels), (gallery, gallery_labels) = random_set(queries, 9, seed), random_set(items, 12, seed + 1)
    return rows, labels, (gallery, gallery_labels)


@pytest.mark.parametrize("sets", [random_set(1500), queries_and_gallery(), queries_and_gallery(2000, 100)])
@pytest.mark.parametrize("far", [0.01, 0.1, 0.4])
def test_a_sample_for_a_small_far_counts_the_nearest_negatives_as_one_for_all(sets, far):
    grid = PairGrid.of(*sets)
    whole, near = sampled_negatives(grid, 50_000), sampled_negatives(grid, 50_000, far=far)
    assert near.sum() == whole.sum() >= 50_000
    assert len(near) < len(whole), "nothing was put together"
    np.testing.assert_array_equal(near[:-1], whole[: len(near) - 1])
    assert near[:-1].sum() >= far * whole.sum()


def test_a_sample_whose_first_look_deceives_is_made_again(monkeypatch):
    grid = PairGrid.of(*random_set(1500))
    whole = sampled_negatives(grid, 50_000)
    nearest = CELLS - 1 - whole.nonzero()[0][0]
    monkeypatch.setattr(pair_sample, "_cell_of_share", lambda similarity, share: int(nearest))
    np.testing.assert_array_equal(sampled_negatives(grid, 50_000, far=0.1), whole)


def brute_force(rows, labels, gallery=None):
    """Every pair as (class index of the first, label, label, similarity), plainly."""
    unit = [x / np.linalg.norm(x) for x in np.asarray(rows, np.float64)]
    if gallery is None:
        return [(labels[i], labels[j], unit[i] @ unit[j]) for i in range(len(unit)) for j in range(i + 1, len(unit))]
    items = [x / np.linalg.norm(x) for x in np.asarray(gallery[0], np.float64)]
    return [(a, b, x @ y) for a, x in zip(labels, unit, strict=True) for b, y in zip(gallery[1], items, strict=True)]


@pytest.mark.parametrize("tile", [8, 64, 512])
@pytest.mark.parametrize("sizes", [(43, 70), (70, 43), (1, 70), (64, 64), (5, 129)])
def test_queries_meet_every_gallery_item(sizes, tile, monkeypatch):
    monkeypatch.setattr(pair_grid, "TILE", tile)
    rows, labels, gallery = queries_and_gallery(*sizes, seed=2)
    grid = PairGrid.of(rows.astype(np.float64), labels, gallery)
    pairs = brute_force(rows, labels, gallery)
    known = sorted(set(labels.tolist()))
    assert grid.labels_C.tolist() == known
    assert grid.positives_C.tolist() == [sum(a == b == label for a, b, _ in pairs) for label in known]
    assert grid.negatives_C.tolist() == [sum(a == label != b for a, b, _ in pairs) for label in known]
    assert (grid.positives, grid.negatives) == (grid.positives_C.sum(), grid.negatives_C.sum())
    edges = np.array([0.8, 0.3, 0.3, 0.0, -0.5, -1.1])
    positives, negatives = count_accepted(grid, edges)
    for i, label in enumerate(known):
        near = [[s >= edge for edge in edges] for a, b, s in pairs if a == b == label]
        far = [[s >= edge for edge in edges] for a, b, s in pairs if a == label != b]
        assert positives[i].tolist() == np.sum(near, axis=0).tolist() if near else not positives[i].any()
        assert negatives[i].tolist() == np.sum(far, axis=0).tolist()
    every = similarity_histograms(grid)
    assert every.sum(axis=1).tolist() == [grid.positives, grid.negatives]
    np.testing.assert_array_equal(positives_histogram(grid), every[0])


@pytest.mark.parametrize("n", [3, 5, 17, 64, 65, 127])
@pytest.mark.parametrize("tile", [2, 32])
def test_every_size_of_set_on_every_size_of_tile(n, tile, monkeypatch):
    monkeypatch.setattr(pair_grid, "TILE", tile)
    rows, labels = random_set(n, seed=n)[0], np.arange(n) % min(4, n - 1)
    grid = PairGrid.of(rows.astype(np.float64), labels)
    pairs = brute_force(rows, labels)
    positives, negatives = count_accepted(grid, np.array([0.5, -1.1]))
    for i, label in enumerate(grid.labels_C):
        own = [s for a, b, s in pairs if a == b == label]
        other = [s for a, b, s in pairs if (a == label) != (b == label)]
        assert positives[i].tolist() == [sum(s >= 0.5 for s in own), len(own)]
        assert negatives[i].tolist() == [sum(s >= 0.5 for s in other), len(other)]
    np.testing.assert_array_equal(positives_histogram(grid), similarity_histograms(grid)[0])


def test_where_few_pairs_are_accepted_batches_end_with_the_size_of_their_tables(monkeypatch):
    sizes = []

    class Noting(TileTallyOnCPU):
        def _table(self, key, bin_, size):
            sizes.append(size)
            return super()._table(key, bin_, size)

    monkeypatch.setattr("dml.metrics.pair_counts.TileTallyOnCPU", Noting)
    monkeypatch.setattr(pair_grid, "TILE", 32)
    grid, edges = PairGrid.of(random_set(400)[0], np.arange(400) // 2), np.linspace(0.9999, 0.999, 4001)
    found = count_accepted(grid, edges)
    of_a_tile = 17 * len(edges)
    assert len(sizes) > 2
    assert max(sizes) <= tile_tally._TABLE + of_a_tile
    monkeypatch.setattr("dml.metrics.pair_counts.TileTallyOnCPU", TileTally)
    np.testing.assert_array_equal(found, count_accepted(grid, edges))


def test_cells_and_edges_agree():
    for similarity in (-1.0, -0.3, 0.0, 1e-6, 0.5, 1.0):
        assert cell_edge(cell_of(similarity)) <= similarity < cell_edge(cell_of(similarity) + 1)


@pytest.mark.parametrize("batch", [1, 500, 2**17])
@pytest.mark.parametrize("sets", [random_set(300, 7), queries_and_gallery(90, 200)])
def test_the_plain_tally_and_the_one_for_cpus_agree(sets, batch, monkeypatch):
    monkeypatch.setattr(pair_grid, "TILE", 32)
    monkeypatch.setattr(tile_tally, "_BATCH", batch)
    grid = PairGrid.of(*sets)
    edges = torch.linspace(0.95, -0.2, 40)
    tallies = [tally(grid, edges) for tally in (TileTally, TileTallyOnCPU)]
    for tile in pair_grid.similarity_tiles(grid, grid.tiles):
        for tally in tallies:
            tally.add(tile)
    plain, batched = (tally.counts() for tally in tallies)
    assert plain.sum() > 1000
    assert plain.tolist() == batched.tolist()

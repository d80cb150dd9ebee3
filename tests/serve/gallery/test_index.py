"""The search against a loop over all rows, exact and by an inverted file, while rows come, change and go."""

import threading
import time
from typing import Any

import numpy as np
import pytest

from serve.gallery.index import RECALL, RECALL_K, Index
from serve.gallery.lock import SharedLock
from tests.serve.gallery.rows import Row, clustered, nearest, units


def of(rows: Row, **settings: Any) -> Index:
    index = Index(rows.shape[1], SharedLock(), **settings)
    index.put(range(len(rows)), rows)
    return index


def exactly(index: Index, query: Row, k: int) -> list[tuple[str, float]]:
    return nearest({str(slot): row for slot, row in enumerate(index.rows)}, query, k)


def found(index: Index, query: Row, k: int) -> list[tuple[str, float]]:
    distances, slots = index.search(query, k)
    return list(zip(map(str, slots.tolist()), distances.tolist(), strict=True))


@pytest.mark.parametrize("k", [1, 7, 60, 1000])
def test_the_exact_search_is_that_of_a_loop(k: int) -> None:
    index = of(units(300))
    for query in units(20, seed=1):
        got, expected = found(index, query, k), exactly(index, query, k)
        assert [name for name, _ in got] == [name for name, _ in expected]
        np.testing.assert_allclose([d for _, d in got], [d for _, d in expected], atol=1e-6)


def test_the_row_itself_is_at_distance_zero() -> None:
    index = of(units(300))
    for row in index.rows[:20]:
        assert index.search(row, 1)[0][0] == 0.0


def test_an_empty_index_finds_nothing() -> None:
    index = Index(8, SharedLock())
    assert found(index, units(1)[0], 5) == []
    index.put([0], units(1))
    index.remove(0)
    assert found(index, units(1)[0], 5) == []


def changed(index: Index, seed: int, steps: int = 300) -> None:
    """Replaces, adds and removes rows at random."""
    rng = np.random.default_rng(seed)
    fresh = iter(clustered(3 * steps, index.rows.shape[1], seed))
    for _ in range(steps):
        index.put([int(rng.integers(len(index)))], next(fresh)[None])
        index.put([len(index), len(index) + 1], np.stack([next(fresh), next(fresh)]))
        for _ in range(2):
            index.remove(int(rng.integers(len(index))))


def recall(index: Index, k: int = 10, queries: int = 100) -> float:
    picked = np.random.default_rng(5).choice(len(index), queries, replace=False)
    hits = 0
    for row in index.rows[picked]:
        truth = {name for name, _ in exactly(index, row, k)}
        hits += len(truth & {name for name, _ in found(index, row, k)})
    return hits / (k * queries)


def test_an_inverted_file_finds_what_it_says_through_all_changes() -> None:
    index = of(clustered(4000), exact_up_to=1000)
    assert index.stale
    index.build()
    assert not index.stale
    report = index.report
    assert report.kind == "ivf"
    assert report.probes < report.lists
    assert report.recall >= RECALL
    assert recall(index) >= RECALL - 0.01
    changed(index, seed=1)
    assert recall(index) >= RECALL - 0.03
    for query in index.rows[:50]:
        got, rows = found(index, query, 10), index.rows
        for name, distance in got:
            assert distance == pytest.approx(np.linalg.norm(rows[int(name)] - query), abs=1e-5), "distances are exact"
        assert [d for _, d in got] == sorted(d for _, d in got)


@pytest.mark.parametrize("k", [21, 50])
def test_more_neighbours_than_the_recall_was_measured_on_are_the_true_ones(k: int) -> None:
    """Of many small classes: beyond a row's own, the nearest lie in lists that it is not near to."""
    centres = np.repeat(units(200, 64), 20, axis=0)
    rows = centres + 0.06 * np.random.default_rng(1).standard_normal(centres.shape)
    index = of((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), exact_up_to=1000)
    index.build()
    assert index.report.kind == "ivf"
    for query in index.rows[::400]:
        assert [name for name, _ in found(index, query, k)] == [name for name, _ in exactly(index, query, k)]


def test_lists_that_have_run_empty_do_not_make_a_search_find_fewer() -> None:
    index = of(clustered(4000), exact_up_to=1000)
    index.build()
    query = index.rows[0].copy()
    for name, _ in sorted(exactly(index, query, 1000), key=lambda each: -int(each[0])):  # the last slot first
        index.remove(int(name))
    assert index.report.kind == "ivf"
    assert len(found(index, query, RECALL_K)) == RECALL_K


def test_what_others_do_to_faiss_does_not_matter() -> None:
    """Libraries of losses import this, which replaces methods of faiss's classes."""
    import faiss.contrib.torch_utils  # noqa: F401

    index = of(clustered(2000), exact_up_to=1000)
    index.build()
    assert index.report.kind == "ivf"
    assert recall(index) >= RECALL - 0.01


def test_an_index_whose_rows_have_become_others_is_made_anew() -> None:
    index = of(clustered(3000), exact_up_to=1000)
    index.build()
    index.put(range(2999), clustered(2999, seed=1))
    assert not index.stale
    index.put([0], clustered(1, seed=2))
    assert index.stale


def test_changes_while_it_is_built_are_found() -> None:
    lock = SharedLock()
    index = Index(16, lock, exact_up_to=1000)
    index.put(range(20_000), clustered(20_000))
    stop, count = threading.Event(), 0

    def write() -> None:
        nonlocal count
        while not stop.is_set():
            with lock.alone():
                changed(index, seed=count, steps=1)
            count += 1
            time.sleep(0.001)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        index.build()
    finally:
        stop.set()
        writer.join()
    assert count > 3, "writers got their turn"
    assert index.report.kind == "ivf"
    missed = [slot for slot in range(len(index)) if index.search(index.rows[slot], 1)[0][0] > 0]
    assert not missed, "every row finds itself"


def test_rows_without_any_order_are_searched_exactly() -> None:
    """In high dimensions all random rows are alike, so that lists do not help."""
    index = of(units(3000, 128), exact_up_to=1000)
    index.build()
    assert index.report.kind == "flat"
    assert not index.stale, "and it is not tried again at once"
    assert recall(index, queries=20) == 1.0


def test_a_gallery_that_shrinks_is_searched_exactly_again() -> None:
    index = of(clustered(2500), exact_up_to=2000)
    index.build()
    assert index.report.kind == "ivf"
    while len(index) >= 1000:
        index.remove(len(index) // 2)
    assert index.report.kind == "flat"
    assert recall(index, queries=20) == 1.0

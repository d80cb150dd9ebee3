"""Recall@K against a sort of all others in float64, and what leave-one-out means when there are duplicates."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dml.metrics import retrieval
from dml.metrics.retrieval import recall_at_k


def sample(n=120, classes=15, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return rng.standard_normal((classes, dim))[labels] + rng.standard_normal((n, dim)), labels


def oracle(rows, labels, k):
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    hits, asked = 0, 0
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if j != i]
        if any(labels[j] == labels[i] for j in others):
            nearest = sorted(others, key=lambda j: -float(unit[i] @ unit[j]))[:k]
            asked += 1
            hits += any(labels[j] == labels[i] for j in nearest)
    return hits / asked, asked


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_sort_of_all_others(seed):
    rows, labels = sample(seed=seed, classes=60)
    found = recall_at_k(rows, labels, ks=(1, 2, 5, 40))
    for k in (1, 2, 5, 40):
        assert found[f"recall@{k}"] == pytest.approx(oracle(rows, labels, k)[0])
    asked = oracle(rows, labels, 1)[1]
    assert (found["queries"], found["queries_left_out"]) == (asked, len(rows) - asked)
    assert found["queries_left_out"] > 0


def test_chunks_change_nothing(monkeypatch):
    rows, labels = sample()
    whole = recall_at_k(rows, labels)
    monkeypatch.setattr(retrieval, "CHUNK", 7)
    assert recall_at_k(rows, labels) == whole


@pytest.mark.parametrize("copies", [1, 3, 50])
def test_a_duplicate_is_a_neighbour_but_the_query_never_is(copies):
    # Every sample of class 0 has a twin in a class of its own nearby; the others of class 0 are far off.
    points = np.eye(8)[:4]
    rows = np.repeat(points, copies + 1, axis=0)
    labels = np.concatenate([[0, *range(1 + i * copies, 1 + (i + 1) * copies)] for i in range(4)])
    found = recall_at_k(rows, labels, ks=(1,))
    assert found == {"recall@1": 0.0, "queries": 4.0, "queries_left_out": 4.0 * copies}


def test_duplicates_of_the_same_class_are_found():
    rows, labels = np.repeat(np.eye(8)[:4], 9, axis=0), np.repeat(np.arange(4), 9)
    assert recall_at_k(rows, labels, ks=(1, 8))["recall@1"] == 1.0


def test_all_embeddings_equal_is_not_a_perfect_score():
    rows, labels = np.ones((40, 4)), np.arange(40) // 2
    assert recall_at_k(rows, labels, ks=(1,))["recall@1"] < 0.2
    assert recall_at_k(rows, labels, ks=(39,))["recall@39"] == 1.0


def test_k_beyond_the_gallery_means_all_others():
    rows, labels = sample(n=12, classes=3)
    found = recall_at_k(rows, labels, ks=(11, 12, 5000))
    assert found["recall@11"] == found["recall@12"] == found["recall@5000"] == 1.0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_invariances(seed):
    rows, labels = sample(n=40, classes=8, seed=seed)
    rng = np.random.default_rng(seed)
    order, turn = rng.permutation(40), np.linalg.qr(rng.standard_normal((6, 6)))[0]
    found = recall_at_k(rows, labels)
    assert recall_at_k(rows[order], labels[order]) == found
    assert recall_at_k(rows @ turn, labels) == found
    assert recall_at_k(rows * 10.0 ** rng.uniform(-3, 3, (40, 1)), labels) == found
    assert recall_at_k(rows, 7 - 3 * labels) == found
    recalls = [found[f"recall@{k}"] for k in (1, 2, 4, 8)]
    assert recalls == sorted(recalls)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_float_widths_of_torch(dtype):
    rows, labels = sample()
    held = torch.from_numpy(rows).to(dtype)
    assert recall_at_k(held, torch.from_numpy(labels)) == recall_at_k(held.double().numpy(), labels)


def test_the_callers_faiss_threads_are_kept():
    import faiss

    before = faiss.omp_get_max_threads()
    recall_at_k(*sample())
    assert faiss.omp_get_max_threads() == before


def test_without_faiss_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "onethreshold\[cpu\]", or "onethreshold\[gpu\]"'):
        recall_at_k(*sample())


@pytest.mark.parametrize("ks", [(), (0,), (1, -2), (1.5,), (True,)])
def test_ks_must_be_positive_integers(ks):
    with pytest.raises(ValueError, match="ks must be positive integers"):
        recall_at_k(*sample(), ks=ks)


def test_bad_rows_are_named():
    rows, labels = sample()
    rows[33] = 0
    with pytest.raises(ValueError, match="row 33"):
        recall_at_k(rows, labels)
    with pytest.raises(ValueError, match="two samples"):
        recall_at_k(rows, np.arange(len(rows)))

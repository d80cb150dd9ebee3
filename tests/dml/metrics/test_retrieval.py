"""Retrieval against loops over sorted lists in float64, and what leave-one-out means when there are duplicates."""

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dml.metrics import neighbours
from dml.metrics.retrieval import recall_at_k, retrieval

KS, MAP_AT = (1, 2, 5, 40), 20


def sample(n=120, classes=15, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return rng.standard_normal((classes, dim))[labels] + rng.standard_normal((n, dim)), labels


def random_with_singletons(seed=0):
    return sample(seed=seed, classes=60)


def one_huge_class():
    rows, labels = sample(n=90, classes=40, seed=5)
    return rows, np.where(np.arange(90) % 9 < 7, 1000, labels)


def duplicates_within_and_across_classes():
    rows, labels = sample(n=20, classes=6, seed=6)
    return np.repeat(rows, 4, axis=0), np.concatenate([labels, labels, labels, (labels + 1) % 6])


def ties_everywhere():
    # Sums of few unit vectors: a handful of different similarities, exact in float32.
    rng = np.random.default_rng(7)
    return np.eye(4)[rng.integers(0, 4, 60)], rng.integers(0, 7, 60)


def all_equal():
    return np.ones((30, 4)), np.arange(30) // 3


SETS = [random_with_singletons, one_huge_class, duplicates_within_and_across_classes, ties_everywhere, all_equal]


def measures(relevant, positives):
    """All measures of one query from its ranked list of hits and misses, by their definitions."""

    def precision(i):
        return sum(relevant[:i]) / i

    def average_precision(depth):
        found = sum(precision(i) for i in range(1, min(depth, len(relevant)) + 1) if relevant[i - 1])
        return found / min(depth, positives)

    return {
        **{f"recall@{k}": float(any(relevant[:k])) for k in KS},
        "precision@1": float(relevant[0]),
        "r_precision": precision(positives),
        "map@r": average_precision(positives),
        f"map@{MAP_AT}": average_precision(MAP_AT),
    }


def oracle(rows, labels, gallery=None):
    """Of each query the lowest and highest measures that any order of equal similarities gives; None if left out."""
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    rows_G, labels_G = (rows, labels) if gallery is None else gallery
    rows_G = rows_G / np.linalg.norm(rows_G, axis=1, keepdims=True)
    found = []
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        others = [j for j in range(len(rows_G)) if gallery is not None or j != i]
        listed = [(round(float(row @ rows_G[j]), 5), bool(labels_G[j] == label)) for j in others]
        positives = sum(relevant for _, relevant in listed)
        if not positives:
            found.append(None)
            continue
        worst = [relevant for _, relevant in sorted(listed, key=lambda pair: (-pair[0], pair[1]))]
        best = [relevant for _, relevant in sorted(listed, key=lambda pair: (-pair[0], not pair[1]))]
        found.append((measures(worst, positives), measures(best, positives)))
    return found


def assert_equals_oracle(rows, labels, gallery=None):
    found, expected = retrieval(rows, labels, ks=KS, map_at=MAP_AT, gallery=gallery), oracle(rows, labels, gallery)
    asked = [i for i, bounds in enumerate(expected) if bounds]
    for i in asked:
        worst, best = expected[i]
        assert set(found.values) == set(best)
        for name, values in found.values.items():
            assert worst[name] - 1e-12 <= values[i] <= best[name] + 1e-12, (name, i)
    left_out = [i for i, bounds in enumerate(expected) if bounds is None]
    assert all(np.isnan(values[left_out]).all() for values in found.values.values())
    means = found.means()
    assert (means["queries"], means["queries_left_out"]) == (len(asked), len(left_out))
    for name, values in found.values.items():
        assert means[name] == pytest.approx(sum(values[i] for i in asked) / len(asked))
    return expected


@pytest.fixture(params=["faiss", "whole rows", "chunks"])
def _search(request, monkeypatch):
    if request.param == "whole rows":
        monkeypatch.setattr(neighbours, "FAISS_K", 6)
        monkeypatch.setattr(neighbours, "ENTRIES", 1000)
    elif request.param == "chunks":
        monkeypatch.setattr(neighbours, "QUERIES", 7)


@pytest.mark.usefixtures("_search")
@pytest.mark.parametrize("make", SETS)
def test_equals_loops_over_sorted_lists(make):
    assert_equals_oracle(*make())


@pytest.mark.usefixtures("_search")
@pytest.mark.parametrize("make", SETS)
def test_equals_loops_over_a_gallery(make):
    rows, labels = make()
    expected = assert_equals_oracle(
        rows[1::3], labels[1::3], gallery=(np.delete(rows, np.s_[1::3], axis=0), np.delete(labels, np.s_[1::3]))
    )
    assert any(expected)


def test_the_oracle_leaves_no_room_where_nothing_is_tied():
    for seed in range(3):
        bounds = [pair for pair in oracle(*random_with_singletons(seed)) if pair]
        assert all(worst == best for worst, best in bounds)
        assert None in oracle(*random_with_singletons(seed))
        assert_equals_oracle(*random_with_singletons(seed))


def test_recall_alone_is_the_recall_of_all_measures():
    for make in SETS[:2]:
        rows, labels = make()
        gallery = (rows[::2], labels[::2])
        for arguments in ({}, {"gallery": gallery}):
            means = retrieval(rows, labels, ks=KS, **arguments).means()
            alone = recall_at_k(rows, labels, KS, **arguments)
            assert alone == {name: means[name] for name in alone}
            assert set(alone) == {*(f"recall@{k}" for k in KS), "queries", "queries_left_out"}
            assert means["precision@1"] == means["recall@1"]


def test_figures_of_a_list_worked_by_hand():
    # One query at angle 0 and a gallery by growing angle: hit, miss, hit, hit; R = 3.
    angles = np.array([0.1, 0.2, 0.3, 0.4])
    gallery = np.stack([np.cos(angles), np.sin(angles)], axis=1), np.array([5, 6, 5, 5])
    means = retrieval(np.array([[1.0, 0.0]]), np.array([5]), gallery=gallery, ks=(1,), map_at=2).means()
    assert means == {
        "recall@1": 1.0,
        "precision@1": 1.0,
        "r_precision": pytest.approx(2 / 3),
        "map@r": pytest.approx((1 + 2 / 3) / 3),
        "map@2": pytest.approx(1 / 2),
        "queries": 1.0,
        "queries_left_out": 0.0,
    }


def test_a_perfect_ranking_has_one_everywhere():
    rows, labels = np.repeat(np.eye(6), [1, 2, 3, 30, 4, 5], axis=0), np.repeat(np.arange(6), [1, 2, 3, 30, 4, 5])
    means = retrieval(rows, labels, map_at=7).means()
    assert means.pop("queries") == 44
    assert means.pop("queries_left_out") == 1
    assert set(means.values()) == {1.0}
    assert {"map@r", "map@7"} < set(means)


def test_per_class_figures_are_means_over_the_queries_of_the_class():
    rows, labels = random_with_singletons()
    found = retrieval(rows, labels * 10 - 100)
    classes_C, by_name = found.per_class()
    assert classes_C.tolist() == sorted({label * 10 - 100 for label in labels if (labels == label).sum() > 1})
    for name, value_C in by_name.items():
        for label, value in zip(classes_C, value_C, strict=True):
            assert value == pytest.approx(np.mean(found.values[name][found.labels_Q == label]))


def test_a_gallery_does_not_leave_a_query_out_of_itself():
    rows, labels = sample()
    alike = retrieval(rows, labels, gallery=(rows, labels))
    assert alike.means()["recall@1"] == 1.0
    assert alike.positives_Q.tolist() == [(labels == label).sum() for label in labels]
    assert retrieval(rows, labels).means()["recall@1"] < 1.0


def test_same_figures_as_pytorch_metric_learning():
    calculator = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    names = {"precision@1": "precision_at_1", "r_precision": "r_precision", "map@r": "mean_average_precision_at_r"}
    measure = calculator.AccuracyCalculator(tuple(names.values()), k="max_bin_count", device=torch.device("cpu"))
    for seed in range(3):
        rows, labels = sample(n=400, classes=70, dim=16, seed=seed)
        unit = torch.nn.functional.normalize(torch.from_numpy(rows).float(), dim=1)
        other, ours = measure.get_accuracy(unit, torch.from_numpy(labels)), retrieval(unit, labels).means()
        assert 0.1 < ours["map@r"] < 0.9
        for name, their_name in names.items():
            assert ours[name] == pytest.approx(other[their_name], abs=1e-6)
        other = measure.get_accuracy(unit[:90], torch.from_numpy(labels[:90]), unit[90:], torch.from_numpy(labels[90:]))
        ours = retrieval(unit[:90], labels[:90], gallery=(unit[90:], labels[90:])).means()
        for name, their_name in names.items():
            assert ours[name] == pytest.approx(other[their_name], abs=1e-6)


@pytest.mark.parametrize("copies", [1, 3, 50])
def test_a_duplicate_is_a_neighbour_but_the_query_never_is(copies):
    # Every sample of class 0 has twins in classes of their own at the same place; the others of class 0 are far off.
    points = np.eye(8)[:4]
    rows = np.repeat(points, copies + 1, axis=0)
    labels = np.concatenate([[0, *range(1 + i * copies, 1 + (i + 1) * copies)] for i in range(4)])
    found = recall_at_k(rows, labels, ks=(1,))
    assert found == {"recall@1": 0.0, "queries": 4.0, "queries_left_out": 4.0 * copies}


def test_all_embeddings_equal_is_not_a_perfect_score():
    rows, labels = np.ones((40, 4)), np.arange(40) // 2
    assert recall_at_k(rows, labels, ks=(1,))["recall@1"] < 0.2
    assert recall_at_k(rows, labels, ks=(39,))["recall@39"] == 1.0
    assert retrieval(rows, labels).means()["map@r"] < 0.2


def test_k_beyond_the_gallery_means_all_others():
    rows, labels = sample(n=12, classes=3)
    found = recall_at_k(rows, labels, ks=(11, 12, 5000))
    assert found["recall@11"] == found["recall@12"] == found["recall@5000"] == 1.0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_invariances(seed):
    rows, labels = sample(n=40, classes=8, seed=seed)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assume(np.diff(np.sort(unit @ unit.T, axis=1), axis=1).min() > 1e-6)  # what float32 cannot tell apart may swap
    rng = np.random.default_rng(seed)
    order, turn = rng.permutation(40), np.linalg.qr(rng.standard_normal((6, 6)))[0]
    found = retrieval(rows, labels)
    for name, value_Q in retrieval(rows[order], labels[order]).values.items():
        np.testing.assert_array_equal(value_Q, found.values[name][order])
    for again in ((rows @ turn, labels), (rows * 10.0 ** rng.uniform(-3, 3, (40, 1)), labels), (rows, 7 - 3 * labels)):
        for name, value_Q in retrieval(*again).values.items():
            np.testing.assert_array_equal(value_Q, found.values[name])
    recalls = [found.means()[f"recall@{k}"] for k in (1, 2, 4, 8)]
    assert recalls == sorted(recalls)
    assert all(0 <= value <= 1 for value_Q in found.values.values() for value in value_Q if not math.isnan(value))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_float_widths_of_torch(dtype):
    rows, labels = sample()
    held = torch.from_numpy(rows).to(dtype)
    assert retrieval(held, torch.from_numpy(labels)).means() == retrieval(held.double().numpy(), labels).means()


def test_without_faiss_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "onethreshold\[cpu\]", or "onethreshold\[gpu\]"'):
        recall_at_k(*sample())


@pytest.mark.parametrize("measure", [recall_at_k, retrieval])
@pytest.mark.parametrize("ks", [(), (0,), (1, -2), (1.5,), (True,)])
def test_ks_must_be_positive_integers(measure, ks):
    with pytest.raises(ValueError, match="ks must be positive integers"):
        measure(*sample(), ks=ks)


@pytest.mark.parametrize("map_at", [0, -1, 2.5, True])
def test_map_at_must_be_a_positive_integer(map_at):
    with pytest.raises(ValueError, match="map_at must be a positive integer or None"):
        retrieval(*sample(), map_at=map_at)


def test_none_spares_the_deep_average_precision():
    assert set(retrieval(*sample(), map_at=None).values) == set(retrieval(*sample()).values) - {"map@1000"}


@pytest.mark.parametrize("measure", [recall_at_k, retrieval])
def test_bad_rows_are_named(measure):
    rows, labels = sample()
    with pytest.raises(ValueError, match="two samples"):
        measure(rows, np.arange(len(rows)))
    with pytest.raises(ValueError, match="a query with a gallery item of its label"):
        measure(rows, labels, gallery=(rows, labels + 1000))
    rows[33] = 0
    with pytest.raises(ValueError, match="row 33"):
        measure(rows, labels)

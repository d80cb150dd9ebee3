"""Clusters against classes: every figure by loops over pairs and blind draws; k-means on sets that it must solve."""

import math
import sys
from collections import Counter
from fractions import Fraction
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

from dml.metrics.clustering import agreement, clustering, expected_information, first_centres, k_means


def blobs(classes=12, samples=15, dim=16, spread=0.001, seed=0):
    """Classes far apart, at right angles when there is room."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), samples)
    return np.eye(dim)[labels % dim] + spread * rng.standard_normal((len(labels), dim)), labels


def partitions(n, classes, clusters, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, classes, n), rng.integers(0, clusters, n)


SETS = {
    "blind": partitions(60, 7, 5),
    "many clusters": partitions(40, 3, 30, seed=1),
    "one huge class": (np.array([0] * 40 + [1, 2, 3, 3]), partitions(44, 2, 4)[1]),
    "singletons": (np.arange(30) // 2 * (np.arange(30) < 20), np.arange(30) // 3),
    "one cluster": (np.arange(20) // 4, np.zeros(20, dtype=int)),
    "each its own cluster": (np.arange(20) // 4, np.arange(20)),
    "labels far apart": (np.array([-(2**62), 2**62, 5, 5, -(2**62), 5]), np.array([9, 9, 1, 1, 9, 9])),
}


def information(labels, clusters):
    """Mutual information and the two entropies, in nats, by counting."""
    n = len(labels)
    mutual = 0.0
    for a in set(labels):
        for b in set(clusters):
            both = sum(x == a and y == b for x, y in zip(labels, clusters, strict=True))
            if both:
                mutual += both / n * math.log(n * both / (labels.count(a) * clusters.count(b)))
    entropies = [-sum(p.count(a) / n * math.log(p.count(a) / n) for a in set(p)) for p in (labels, clusters)]
    return mutual, entropies


def pairwise_f1(labels, clusters):
    pairs = list(combinations(range(len(labels)), 2))
    same_class = {p for p in pairs if labels[p[0]] == labels[p[1]]}
    same_cluster = {p for p in pairs if clusters[p[0]] == clusters[p[1]]}
    both = len(same_class & same_cluster)
    if not both:
        return 0.0
    precision, recall = Fraction(both, len(same_cluster)), Fraction(both, len(same_class))
    return float(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize("name", SETS)
def test_agreement_by_counting(name):
    labels, clusters = SETS[name]
    found = agreement(labels, clusters)
    mutual, entropies = information(labels.tolist(), clusters.tolist())
    assert found["nmi"] == pytest.approx(mutual / (sum(entropies) / 2), abs=1e-12)
    assert found["f1"] == pytest.approx(pairwise_f1(labels.tolist(), clusters.tolist()), abs=1e-12)
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(labels, clusters), abs=1e-10)
    assert found["ami"] == pytest.approx(adjusted_mutual_info_score(labels, clusters), abs=1e-9)


@pytest.mark.parametrize(
    ("labels", "clusters"), [("aabb", "xyyy"), ("aaabbc", "xxyyzz"), ("aaaaab", "xxyyzz"), ("abcdef", "xxxyyy")]
)
def test_expected_information_is_the_mean_over_all_ways_to_deal_the_clusters(labels, clusters):
    deals = [information(list(labels), list(deal))[0] for deal in permutations(clusters)]
    sizes = [np.unique(list(x), return_counts=True)[1] for x in (labels, clusters)]
    expected = sum(deals) / len(deals)
    assert expected_information(*sizes) == pytest.approx(expected, abs=1e-12)
    mutual, entropies = information(list(labels), list(clusters))
    numbers = [np.array([ord(c) for c in x]) for x in (labels, clusters)]
    assert agreement(*numbers)["ami"] == pytest.approx((mutual - expected) / (sum(entropies) / 2 - expected), abs=1e-12)


def test_the_same_partition_under_other_names_is_1():
    for labels in (np.arange(30) // 3, np.arange(30), np.zeros(30, dtype=int)):
        assert agreement(labels, 100 - labels) == {"nmi": 1.0, "ami": 1.0, "f1": 1.0}


def test_blind_clusters_have_no_ami_but_an_nmi_that_grows_with_their_number():
    few, many = (
        np.array([list(agreement(*partitions(400, 40, clusters, seed)).values()) for seed in range(20)]).mean(axis=0)
        for clusters in (4, 200)
    )
    assert abs(few[1]) < 0.01
    assert abs(many[1]) < 0.01
    assert many[0] > few[0] + 0.4


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=2, max_size=60), st.randoms())
def test_agreement_depends_on_the_partitions_alone(pairs, random):
    labels, clusters = np.array(pairs).T
    found = agreement(labels, clusters)
    swapped = agreement(clusters, labels)
    random.shuffle(pairs)
    labels, clusters = np.array(pairs).T
    shuffled = agreement(-3 * labels, torch.from_numpy(clusters + 10**12))
    for name, value in found.items():
        assert swapped[name] == pytest.approx(value, abs=1e-9)
        assert shuffled[name] == pytest.approx(value, abs=1e-9)
    assert -1 <= found["ami"] <= found["nmi"] + 1e-9 <= 1 + 2e-9
    assert 0 <= found["f1"] <= 1


def test_k_means_finds_clusters_that_stand_apart():
    rows, labels = blobs()
    found = clustering(rows, labels)
    assert found == {"nmi": 1.0, "ami": 1.0, "f1": 1.0, "clusters": 12.0}


def test_first_centres_are_drawn_as_one_by_one():
    # Every ordered draw of 3 of 5 rows has a known chance; a chi-square of 59 degrees of freedom passes 110 never.
    rows = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 0], [1, 0.3, 0], [0, 1, 0.1], [-1, 0.2, 1], [0, 0, 1]]))
    squared = torch.cdist(rows.double(), rows.double()).square().numpy()
    chance = {}
    for a, b, c in permutations(range(5), 3):
        near = np.minimum(squared[a], squared[b])
        chance[a, b, c] = 1 / 5 * squared[a, b] / squared[a].sum() * near[c] / near.sum()
    draws = 2000
    seen = Counter(tuple(first_centres(rows, 3, seed=seed).tolist()) for seed in range(draws))
    assert set(seen) <= set(chance)
    assert sum((seen[d] - draws * p) ** 2 / (draws * p) for d, p in chance.items()) < 110


def test_first_centres_cover_classes_that_stand_apart():
    rows, labels = blobs(classes=100, samples=4, dim=100, spread=0.001)
    rows = torch.nn.functional.normalize(torch.from_numpy(rows).float())
    for seed in range(5):
        assert sorted(labels[first_centres(rows, 100, seed=seed)]) == list(range(100))


@pytest.mark.parametrize("k", [1, 3, 4, 5, 40])
def test_first_centres_are_different_rows_also_when_few_differ(k):
    rows = torch.eye(4).repeat_interleave(10, dim=0)
    chosen = first_centres(rows, k)
    assert len(set(chosen.tolist())) == k
    assert len(rows[torch.from_numpy(chosen)].unique(dim=0)) == min(k, 4)


def test_k_is_the_number_of_classes_in_the_set_unless_given():
    rows, labels = blobs()
    some = labels < 5
    assert clustering(rows[some], labels[some])["clusters"] == 5
    assert clustering(rows, labels, k=3)["clusters"] == 3
    assert clustering(rows, labels, k=1) == {
        "nmi": 0.0,
        "ami": pytest.approx(0, abs=1e-12),
        "f1": pytest.approx(2 * 14 / (14 + 179)),
        "clusters": 1,
    }
    each = clustering(rows, labels, k=len(rows))
    assert each["f1"] == 0
    assert each["ami"] == pytest.approx(0, abs=1e-9)


def test_every_sample_belongs_to_the_nearest_mean_of_a_settled_clustering():
    rows, _ = blobs(spread=0.4)
    rows = torch.from_numpy(rows)
    clusters = torch.from_numpy(k_means(rows, 6, iterations=100))
    assert clusters.unique().tolist() == list(range(6))
    means = torch.stack([rows[clusters == c].mean(dim=0) for c in range(6)])
    assert (torch.cdist(rows, means).argmin(dim=1) == clusters).all()


def test_more_restarts_never_give_a_larger_sum_of_squares():
    rows, _ = blobs(classes=16, spread=0.3)
    rows = torch.from_numpy(rows)

    def squares(restarts):
        clusters = torch.from_numpy(k_means(rows, 16, restarts=restarts))
        return sum(float((rows[clusters == c] - rows[clusters == c].mean(dim=0)).square().sum()) for c in range(16))

    once, ten = squares(1), squares(10)
    assert ten < once


def test_a_seed_repeats_exactly_and_another_begins_elsewhere():
    rows, labels = blobs(classes=30, spread=0.5)
    once, again = (k_means(torch.from_numpy(rows), 30, seed=3) for _ in range(2))
    assert (once == again).all()
    assert clustering(rows, labels, seed=3) == clustering(rows, labels, seed=3)
    assert len({clustering(rows, labels, seed=seed)["nmi"] for seed in range(4)}) > 1


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_scaling_rotation_and_names_of_classes_change_nothing(seed):
    rows, labels = blobs(classes=6, seed=seed)
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((16, 16)))[0]
    found = clustering(rows, labels, seed=seed)
    assert clustering(rows * 10.0 ** rng.uniform(-3, 3, (len(rows), 1)), labels, seed=seed) == pytest.approx(found)
    assert clustering(rows @ turn, labels, seed=seed) == pytest.approx(found)
    assert clustering(rows, 7 - 3 * labels, seed=seed) == pytest.approx(found)
    order = rng.permutation(len(rows))  # other rows are drawn first: only the solution is the same
    assert clustering(rows[order], labels[order], seed=seed) == pytest.approx(found)
    assert found["nmi"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_widths(dtype):
    rows, labels = blobs()
    held = torch.from_numpy(rows).to(dtype)
    assert clustering(held, torch.from_numpy(labels)) == clustering(held.float(), labels)


def test_all_embeddings_equal_tell_nothing():
    found = clustering(np.ones((40, 4)), np.arange(40) // 4)
    assert abs(found["ami"]) < 0.3
    assert found["f1"] < 0.4


def test_fewer_different_rows_than_clusters():
    rows, labels = np.repeat(np.eye(4), 10, axis=0), np.arange(40) // 2
    found = clustering(rows, labels)
    assert all(math.isfinite(value) for value in found.values())


def test_the_callers_faiss_threads_are_kept():
    import faiss

    before = faiss.omp_get_max_threads()
    clustering(*blobs())
    assert faiss.omp_get_max_threads() == before


def test_without_faiss_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "onethreshold\[cpu\]", or "onethreshold\[gpu\]"'):
        clustering(*blobs())


def test_what_cannot_be_is_named():
    rows, labels = blobs()
    for k in (0, -1, len(rows) + 1):
        with pytest.raises(ValueError, match=f"k must be from 1 to the number of samples, 180, got {k}"):
            clustering(rows, labels, k=k)
    with pytest.raises(ValueError, match="iterations and restarts must be at least 1, got 0 and 1"):
        clustering(rows, labels, iterations=0)
    with pytest.raises(ValueError, match=r"labels and clusters \(N,\) of one length, got \(180,\) and \(179,\)"):
        agreement(labels, labels[1:])
    with pytest.raises(ValueError, match="one length"):
        agreement(labels[:0], labels[:0])
    rows[33] = 0
    with pytest.raises(ValueError, match="row 33"):
        clustering(rows, labels)

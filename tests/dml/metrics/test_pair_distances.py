"""Pairs by distance, and the ROC read from them, against plain loops over all pairs in float64."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from dml.metrics.pair_distances import PairDistances, accepting_similarity, pair_distances, rates_at, to_distance


def gaussians(classes=9, samples=5, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), samples)
    return rng.standard_normal((classes, dim))[labels] + 0.7 * rng.standard_normal((len(labels), dim)), labels


def lattice(n=60, classes=6, seed=0):
    """Few distinct directions, so that duplicates and ties are everywhere."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(-1, 2, (n, 4)).astype(float)
    rows[~rows.any(axis=1)] = 1.0
    return rows, rng.integers(0, classes, n)


def ragged(seed=1):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 13, 70) ** 2
    labels[:3] = [-5, 1000, 1001]  # singletons
    return rng.standard_normal((70, 5)), labels


def one_huge_class():
    rows, labels = gaussians(20, 3, seed=4)
    labels[12:] = 5
    return rows, labels


SETS = {
    "random": gaussians(),
    "ties and duplicates": lattice(),
    "ragged, with singletons": ragged(),
    "one huge class": one_huge_class(),
    "all equal": (np.ones((8, 3)), np.arange(8) // 2),
    "two classes": gaussians(2, 6, dim=3),
}


def distance_of(x, y, distance):
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    cosine = dot / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
    return 1 - cosine if distance == "cosine" else math.sqrt(max(2 - 2 * cosine, 0.0))


def oracle_pairs(rows, labels, distance="euclidean", gallery=None):
    """Distances of all positives and of all negatives."""
    positives, negatives = [], []
    others = None if gallery is None else list(zip(gallery[0].tolist(), gallery[1].tolist(), strict=True))
    own = list(zip(rows.tolist(), labels.tolist(), strict=True))
    for i, (x, a) in enumerate(own):
        for y, b in own[i + 1 :] if others is None else others:
            (positives if a == b else negatives).append(distance_of(x, y, distance))
    return positives, negatives


def split(gallery_share, rows, labels, seed=0):
    order = np.random.default_rng(seed).permutation(len(rows))
    cut = int(len(rows) * gallery_share)
    return (rows[order[cut:]], labels[order[cut:]]), (rows[order[:cut]], labels[order[:cut]])


def slack(distance_value, distance):
    """Two cells of similarity and what rounding adds, in distance: near 0 a Euclidean one stretches them."""
    return 2.5e-6 if distance == "cosine" else math.sqrt(distance_value**2 + 5e-6) - distance_value + 1e-12


def check(found, positives, negatives, distance):
    assert (found.positives, found.negatives) == (len(positives), len(negatives))
    assert found.distance == distance
    assert (np.diff(found.distances_M) > 0).all()
    assert (found.positives_M + found.negatives_M > 0).all()
    for counts_M, expected in ((found.positives_M, positives), (found.negatives_M, negatives)):
        each = np.repeat(found.distances_M, counts_M)
        for ours, truth in zip(each.tolist(), sorted(expected), strict=True):
            assert -slack(truth, distance) <= ours - truth <= slack(truth, distance)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("name", SETS)
def test_every_pair_is_counted_at_its_distance(name, distance):
    rows, labels = SETS[name]
    check(pair_distances(rows, labels, distance=distance), *oracle_pairs(rows, labels, distance), distance)


@pytest.mark.parametrize("name", ["random", "ties and duplicates", "ragged, with singletons", "one huge class"])
def test_queries_against_a_gallery(name):
    (rows, labels), gallery = split(0.6, *SETS[name])
    found = pair_distances(rows, labels, gallery=gallery)
    check(found, *oracle_pairs(rows, labels, gallery=gallery), "euclidean")


@pytest.mark.parametrize("name", SETS)
def test_rates_auc_and_equal_error_rate_equal_counting(name):
    rows, labels = SETS[name]
    found = pair_distances(rows, labels)
    positives, negatives = oracle_pairs(rows, labels)
    near = [d + 1e-9 for d in found.distances_M.tolist()]  # thresholds, which stand where no rounding reaches
    far = [sum(d <= limit for d in negatives) / len(negatives) for limit in near]
    frr = [sum(d > limit for d in positives) / len(positives) for limit in near]
    assert found.far_M.tolist() == pytest.approx(far, abs=1e-15)
    assert found.frr_M.tolist() == pytest.approx(frr, abs=1e-15)
    truth = [1] * len(positives) + [0] * len(negatives)
    assert found.auc == pytest.approx(roc_auc_score(truth, [-round(d, 5) for d in positives + negatives]), abs=1e-4)
    points = [(0.0, 1.0), *zip(far, frr, strict=True)]
    (far0, frr0), (far1, frr1) = next(ends for ends in pairwise(points) if ends[1][0] >= ends[1][1])
    assert far0 <= found.equal_error_rate <= far1
    assert frr1 <= found.equal_error_rate <= frr0


def test_equal_error_rate_lies_on_the_line_between_two_points():
    pairs = PairDistances(np.array([0.1, 0.2]), np.array([6, 4]), np.array([1, 9]), "euclidean")
    # From FAR 0.1, FRR 0.4 straight to FAR 1, FRR 0: equal after a share of 0.3 / 1.3.
    assert pairs.equal_error_rate == pytest.approx(0.1 + 0.9 * 0.3 / 1.3)
    at_once = PairDistances(np.array([0.1]), np.array([5]), np.array([7]), "euclidean")
    assert (at_once.equal_error_rate, at_once.auc) == (0.5, 0.5)
    perfect = PairDistances(np.array([0.1, 0.2]), np.array([5, 0]), np.array([0, 7]), "euclidean")
    assert (perfect.equal_error_rate, perfect.auc) == (0.0, 1.0)


def test_rates_at_any_threshold():
    rows, labels = gaussians()
    found = pair_distances(rows, labels)
    positives, negatives = (np.array(x) for x in oracle_pairs(rows, labels))
    for threshold in [0.0, 0.3, 0.777, 1.2, 2.0, 5.0]:
        rates = rates_at(found, threshold)
        assert rates == pytest.approx(((negatives <= threshold).mean(), (positives > threshold).mean()), abs=1e-12)
    for at, threshold in enumerate(found.distances_M.tolist()):
        assert rates_at(found, threshold) == (found.far_M[at], found.frr_M[at])


def test_thresholds_of_0_and_2_accept_duplicates_and_opposites():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((6, 7)).astype(np.float32)
    rows, labels = np.concatenate([base, base, -base]), np.tile(np.arange(6), 3)
    found = pair_distances(rows, labels)
    assert rates_at(found, 0.0) == (0.0, 12 / 18)  # of three positives a class, one is of duplicates
    assert rates_at(found, 2.0) == (1.0, 0.0)
    assert accepting_similarity(0.0, "cosine") < 1
    assert accepting_similarity(2.0, "cosine") < -1


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(2, 7), samples=st.integers(2, 5))
def test_invariances(seed, classes, samples):
    rows, labels = gaussians(classes, samples, dim=4, seed=seed)
    rng = np.random.default_rng(seed)
    before = pair_distances(rows, labels)
    order = rng.permutation(len(rows))
    turn = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    scale = 10.0 ** rng.uniform(-3, 3, (len(rows), 1))
    names = rng.permutation(100)[:classes] - 50
    for changed_rows, changed_labels in (
        (rows[order], labels[order]),
        (rows @ turn, labels),
        (rows * scale, labels),
        (rows, names[labels]),
    ):
        after = pair_distances(changed_rows, changed_labels)
        assert after.auc == pytest.approx(before.auc, abs=1e-3)
        each = [np.repeat(pairs.distances_M, pairs.negatives_M) for pairs in (before, after)]
        np.testing.assert_allclose(each[0] ** 2, each[1] ** 2, atol=5e-6)
    assert before.far_M[-1] == 1
    assert before.frr_M[-1] == 0


def test_distances_of_similarity():
    assert to_distance(np.array([1.0, 0.0, -1.0]), "euclidean").tolist() == [0, math.sqrt(2), 2]
    assert to_distance(np.array([1.0, 0.0, -1.0]), "cosine").tolist() == [0, 1, 2]


def test_bad_input_is_named():
    rows, labels = gaussians()
    with pytest.raises(ValueError, match="unknown distance 'cos'; valid: cosine, euclidean"):
        pair_distances(rows, labels, distance="cos")
    with pytest.raises(ValueError, match=r"0 or more, got -0\.1"):
        rates_at(pair_distances(rows, labels), -0.1)
    with pytest.raises(ValueError, match="got nan"):
        rates_at(pair_distances(rows, labels), math.nan)
    with pytest.raises(ValueError, match="got 0 positives and 4 negatives"):
        PairDistances(np.array([1.0]), np.array([0]), np.array([4]), "euclidean")

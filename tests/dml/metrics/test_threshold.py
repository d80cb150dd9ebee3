"""OPIS and its curves against plain loops over pairs in float64, and the properties that the definitions promise."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dml.metrics import threshold_range
from dml.metrics.operating_points import UnreachableFARError
from dml.metrics.pair_distances import to_similarity
from dml.metrics.threshold import (
    ThresholdCurves,
    epsilon_opis,
    mean_utility,
    noise_floor,
    opis,
    sqrt_opis,
    threshold_curves,
    utility,
)


def gaussians(classes, samples, dim=8, spread=0.6, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), samples)
    return rng.standard_normal((classes, dim))[labels] + spread * rng.standard_normal((len(labels), dim)), labels


def lattice(n, classes, seed=0):
    """Few distinct directions, so that duplicates and ties are everywhere."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(-1, 2, (n, 5)).astype(float)
    rows[~rows.any(axis=1)] = 1.0
    return rows, rng.integers(0, classes, n)


def with_singletons():
    rows, labels = gaussians(12, 5, seed=3)
    labels[1:5] = [100, 101, -7, 103]  # and class 0 is left with one
    return rows, labels


def one_huge_class():
    rows, labels = gaussians(30, 3, seed=4)
    labels[20:] = 5
    return rows, labels


SETS = {
    "random": gaussians(9, 7),
    "many small classes": gaussians(40, 2, dim=6),
    "ragged": (gaussians(10, 8)[0], np.random.default_rng(1).integers(0, 13, 80) ** 2),
    "singletons": with_singletons(),
    "one huge class": one_huge_class(),
    "ties and duplicates": lattice(90, 6),
    "two classes": gaussians(2, 15, dim=3),
}


def pair_list(rows, labels):
    """Every unordered pair as (label, label, cosine similarity), in float64."""
    unit = [
        [x / math.sqrt(sum(y * y for y in row)) for x in row] for row in np.asarray(rows, dtype=np.float64).tolist()
    ]
    return [
        (int(labels[i]), int(labels[j]), sum(a * b for a, b in zip(unit[i], unit[j], strict=True)))
        for i, j in combinations(range(len(unit)), 2)
    ]


def distance_of(similarity, distance):
    similarity = min(similarity, 1.0)
    return 1 - similarity if distance == "cosine" else math.sqrt(2 - 2 * similarity)


def oracle_threshold(pairs, far, distance):
    """The farthest negative that can be accepted, with all that are nearer or tied (1e-9), at this FAR."""
    negatives = sorted(distance_of(s, distance) for a, b, s in pairs if a != b)
    best = None
    for d in negatives:
        if sum(other <= d + 1e-9 for other in negatives) / len(negatives) <= far:
            best = d
    return best


def oracle_curves(pairs, labels, thresholds, distance):
    """Sensitivity and specificity by counting, for every class that has positives."""
    sensitivity, specificity = [], []
    for label in sorted(set(labels.tolist())):
        own = [distance_of(s, distance) for a, b, s in pairs if a == b == label]
        other = [distance_of(s, distance) for a, b, s in pairs if (a == label) != (b == label)]
        if own:
            sensitivity.append([sum(d <= t for d in own) / len(own) for t in thresholds])
            specificity.append([sum(d > t for d in other) / len(other) for t in thresholds])
    return np.array(sensitivity), np.array(specificity)


def oracle_utility(curves, c):
    out = np.zeros_like(curves.sensitivity_CT)
    for (i, t), psi in np.ndenumerate(curves.sensitivity_CT):
        phi = curves.specificity_CT[i, t]
        below = c**2 * phi + psi
        out[i, t] = (1 + c**2) * phi * psi / below if below else 0.0
    return out


def assert_same_thresholds(found, expected, distance="euclidean"):
    """Equal but for the grid on which similarities are compared, 1e-6; in distance that is more for near pairs."""
    np.testing.assert_allclose(*(to_similarity(np.asarray(x), distance) for x in (found, expected)), atol=2e-6, rtol=0)


def made_up(sensitivity, specificity, positives=10, negatives=1000):
    sensitivity, specificity = np.asarray(sensitivity, float), np.asarray(specificity, float)
    classes, total = sensitivity.shape
    return ThresholdCurves(
        thresholds_T=np.linspace(0.5, 1.0, total),
        sensitivity_CT=sensitivity,
        specificity_CT=specificity,
        classes_C=np.arange(classes),
        positives_C=np.broadcast_to(np.asarray(positives), (classes,)),
        negatives_C=np.broadcast_to(np.asarray(negatives), (classes,)),
        singletons=0,
        distance="euclidean",
        range_from="far",
        range_bounds=(0.01, 0.1),
    )


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("name", SETS)
def test_curves_equal_counting_over_pairs(name, distance):
    rows, labels = SETS[name]
    pairs = pair_list(rows, labels)
    curves = threshold_curves(rows, labels, far_range=(0.05, 0.4), num_thresholds=9, distance=distance)
    ends = [oracle_threshold(pairs, far, distance) for far in (0.05, 0.4)]
    assert_same_thresholds(curves.thresholds_T[[0, -1]], ends, distance)
    np.testing.assert_array_equal(curves.thresholds_T, np.linspace(*curves.thresholds_T[[0, -1]], 9))
    sensitivity, specificity = oracle_curves(pairs, labels, curves.thresholds_T, distance)
    np.testing.assert_allclose(curves.sensitivity_CT, sensitivity, atol=1e-12)
    np.testing.assert_allclose(curves.specificity_CT, specificity, atol=1e-12)


@pytest.mark.parametrize("name", SETS)
def test_float32_counts_like_float64_away_from_edges(name):
    rows, labels = SETS[name]
    single = threshold_curves(rows.astype(np.float32), labels, far_range=(0.05, 0.4))
    double = threshold_curves(rows, labels, far_range=(0.05, 0.4))
    assert_same_thresholds(single.thresholds_T, double.thresholds_T)
    assert (single.sensitivity_CT != double.sensitivity_CT).mean() < 0.01
    assert opis(single) == pytest.approx(opis(double), rel=1e-3)


def test_pair_counts_and_singletons():
    rows, labels = with_singletons()
    curves = threshold_curves(rows, labels, far_range=(0.05, 0.4))
    assert curves.classes_C.tolist() == sorted(label for label in set(labels.tolist()) if (labels == label).sum() > 1)
    sizes = np.array([(labels == label).sum() for label in curves.classes_C])
    assert curves.positives_C.tolist() == (sizes * (sizes - 1) // 2).tolist()
    assert curves.negatives_C.tolist() == (sizes * (len(labels) - sizes)).tolist()
    assert curves.singletons == 5
    assert curves.classes_C.dtype == curves.positives_C.dtype == curves.negatives_C.dtype == np.int64
    assert curves.sensitivity_CT.dtype == curves.specificity_CT.dtype == curves.thresholds_T.dtype == np.float64


def test_singletons_count_as_negatives_of_the_others():
    rows = np.array([[1, 0.0], [1, 0.1], [1, 0.05], [0, 1.0], [-1, 0.1], [-1, 0.0]])
    curves = threshold_curves(rows, np.array([0, 0, 1, 2, 3, 3]), far_range=(0.2, 0.5), num_thresholds=2)
    # The only near negatives are those of sample 2, the one sample of its class, with the two of class 0.
    assert curves.specificity_CT[:, 0].tolist() == [1 - 2 / 8, 1.0]


def oracle_frr_threshold(pairs, frr, distance):
    """The nearest positive at which rejecting all that are farther (by more than 1e-9) keeps to this FRR."""
    positives = sorted(distance_of(s, distance) for a, b, s in pairs if a == b)
    return min(d for d in positives if sum(other > d + 1e-9 for other in positives) / len(positives) <= frr)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("name", SETS)
def test_a_range_from_frr_bounds_ascends_in_distance(name, distance):
    rows, labels = SETS[name]
    pairs = pair_list(rows, labels)
    low, high = 0.1, 0.6
    curves = threshold_curves(rows, labels, frr_range=(low, high), num_thresholds=5, distance=distance)
    ends = [oracle_frr_threshold(pairs, frr, distance) for frr in (high, low)]
    assert_same_thresholds(curves.thresholds_T[[0, -1]], ends, distance)
    assert (curves.range_from, curves.range_bounds) == ("frr", (low, high))
    sensitivity, specificity = oracle_curves(pairs, labels, curves.thresholds_T, distance)
    np.testing.assert_allclose(curves.sensitivity_CT, sensitivity, atol=1e-12)
    np.testing.assert_allclose(curves.specificity_CT, specificity, atol=1e-12)
    accepted = (curves.sensitivity_CT * curves.positives_C[:, None]).sum(0) / curves.positives_C.sum()
    assert 1 - high - 1e-12 <= accepted[0] <= accepted[-1]
    assert accepted[-1] >= 1 - low - 1e-12


@pytest.mark.parametrize(("distance", "bounds"), [("euclidean", (0.3, 1.3)), ("cosine", (0.05, 0.9))])
@pytest.mark.parametrize("name", SETS)
def test_a_range_given_as_distances(name, distance, bounds):
    rows, labels = SETS[name]
    curves = threshold_curves(rows, labels, distance_range=bounds, num_thresholds=6, distance=distance)
    np.testing.assert_array_equal(curves.thresholds_T, np.linspace(*bounds, 6))
    assert (curves.range_from, curves.range_bounds) == ("distance", bounds)
    sensitivity, specificity = oracle_curves(pair_list(rows, labels), labels, curves.thresholds_T, distance)
    np.testing.assert_allclose(curves.sensitivity_CT, sensitivity, atol=1e-12)
    np.testing.assert_allclose(curves.specificity_CT, specificity, atol=1e-12)


def test_a_calibrated_range_given_again_as_distances_gives_the_same_curves():
    rows, labels = SETS["ties and duplicates"]
    for distance in ("euclidean", "cosine"):
        curves = threshold_curves(rows.astype(np.float32), labels, far_range=(0.05, 0.4), distance=distance)
        again = threshold_curves(
            rows.astype(np.float32), labels, distance_range=tuple(curves.thresholds_T[[0, -1]]), distance=distance
        )
        for field in ("thresholds_T", "sensitivity_CT", "specificity_CT"):
            np.testing.assert_array_equal(getattr(again, field), getattr(curves, field))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_no_rounding_keeps_duplicates_out_at_0_or_opposites_at_2(distance, dtype):
    rng = np.random.default_rng(0)
    point = rng.standard_normal((10, 77)).repeat(4, axis=0)
    rows = np.concatenate([point, -point]).astype(dtype)
    labels = np.concatenate([np.arange(10).repeat(4), np.arange(10).repeat(4)[::-1]])
    curves = threshold_curves(rows, labels, distance_range=(0, 2), num_thresholds=3, distance=distance)
    # Of each class 4 samples are one point and 4 another: 12 of its 28 pairs are duplicates, 16 are not.
    assert (curves.sensitivity_CT[:, [0, -1]] == [12 / 28, 1]).all()
    assert (curves.specificity_CT[:, [0, -1]] == [1, 0]).all()


def test_embeddings_all_alike_have_curves_at_given_distances_only():
    rows, labels = np.ones((40, 16), np.float32), np.arange(40) % 8
    curves = threshold_curves(rows, labels, distance_range=(0, 0.5))
    assert (curves.sensitivity_CT == 1).all()
    assert (curves.specificity_CT == 0).all()
    assert (opis(curves), sqrt_opis(curves), mean_utility(curves), noise_floor(curves)) == (0, 0, 0, 0)
    with pytest.raises(UnreachableFARError, match="700 negative pairs resolve no FAR below 1"):
        threshold_curves(rows, labels)
    with pytest.raises(ValueError, match=r"FRR 0\.1 cannot be told from 0: 80 positive pairs resolve no FRR below 1"):
        threshold_curves(rows, labels, frr_range=(0.1, 0.5))


GALLERIES = {
    "random": (gaussians(9, 3, seed=5), gaussians(9, 6, seed=5)),
    "queries without an item, items without a query": (
        (gaussians(6, 4)[0], gaussians(6, 4)[1] * 2),
        (gaussians(9, 5)[0], gaussians(9, 5)[1]),
    ),
    "ties and duplicates": (lattice(40, 5), lattice(70, 7, seed=1)),
    "one query": (gaussians(1, 1), gaussians(5, 4)),
    "the gallery is asked about itself": (gaussians(6, 5), gaussians(6, 5)),
}
BOUNDS = {"far_range": (0.07, 0.4), "frr_range": (0.3, 0.7), "distance_range": (0.41, 1.21)}


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("name", GALLERIES)
def test_queries_against_a_gallery_equal_counting_over_pairs(name, distance, kind):
    (queries, labels), (items, item_labels) = GALLERIES[name]
    pairs = [
        (*own, s)
        for *own, s in (
            (int(a), int(b), float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)))
            for x, a in zip(queries, labels, strict=True)
            for y, b in zip(items, item_labels, strict=True)
        )
    ]
    curves = threshold_curves(
        queries, labels, gallery=(items, item_labels), **{kind: BOUNDS[kind]}, num_thresholds=7, distance=distance
    )
    low, high = BOUNDS[kind]
    if kind == "far_range":
        ends = [oracle_threshold(pairs, far, distance) for far in (low, high)]
    elif kind == "frr_range":
        ends = [oracle_frr_threshold(pairs, frr, distance) for frr in (high, low)]
    else:
        ends = [low, high]
    assert_same_thresholds(curves.thresholds_T[[0, -1]], ends, distance)
    asked = sorted(set(labels.tolist()))
    answered = [label for label in asked if label in item_labels]
    assert curves.classes_C.tolist() == answered
    assert curves.singletons == len(asked) - len(answered)
    for i, label in enumerate(answered):
        own = [distance_of(s, distance) for a, b, s in pairs if a == b == label]
        other = [distance_of(s, distance) for a, b, s in pairs if a == label != b]
        assert (curves.positives_C[i], curves.negatives_C[i]) == (len(own), len(other))
        near, far = ([sum(d <= t for d in side) / len(side) for t in curves.thresholds_T] for side in (own, other))
        np.testing.assert_allclose(curves.sensitivity_CT[i], near, atol=1e-12)
        np.testing.assert_allclose(1 - curves.specificity_CT[i], far, atol=1e-12)


def test_pooled_far_at_the_ends_is_the_largest_within_the_bounds():
    rows, labels = SETS["random"]
    negatives = sorted(distance_of(s, "euclidean") for a, b, s in pair_list(rows, labels) if a != b)
    curves = threshold_curves(rows, labels)
    for end, far in ((0, 0.01), (-1, 0.10)):
        accepted = sum(d <= curves.thresholds_T[end] for d in negatives)
        assert accepted / len(negatives) <= far < (accepted + 1) / len(negatives)


def test_ties_are_accepted_together_or_not_at_all():
    # 4 of the 24 negatives are duplicates, the other 20 stand at a right angle: no FAR between 1/6 and 1 exists.
    rows, labels = np.eye(4)[[0, 0, 1, 1, 0, 0, 2, 3]], np.array([0, 0, 1, 1, 2, 2, 3, 3])
    curves = threshold_curves(rows, labels, far_range=(0.2, 0.9), num_thresholds=3)
    assert curves.thresholds_T == pytest.approx([0, 0, 0], abs=2e-3)
    pooled_far = ((1 - curves.specificity_CT) * curves.negatives_C[:, None]).sum(0) / curves.negatives_C.sum()
    assert pooled_far == pytest.approx([4 / 24] * 3)


@pytest.mark.parametrize("tile", [2, 8, 64])
@pytest.mark.parametrize("name", SETS)
def test_tile_size_changes_nothing(name, tile, monkeypatch):
    rows, labels = SETS[name]
    whole = threshold_curves(rows, labels, far_range=(0.05, 0.4))
    monkeypatch.setattr("dml.metrics.pair_grid.TILE", tile)
    tiled = threshold_curves(rows, labels, far_range=(0.05, 0.4))
    for field in ("thresholds_T", "sensitivity_CT", "specificity_CT"):
        np.testing.assert_array_equal(getattr(tiled, field), getattr(whole, field))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_number_of_threads_changes_nothing(threads, monkeypatch):
    monkeypatch.setattr("dml.metrics.pair_grid.TILE", 16)
    rows, labels = gaussians(20, 11)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = threshold_curves(rows, labels)
        torch.set_num_threads(threads)
        several = threshold_curves(rows, labels)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(one.sensitivity_CT, several.sensitivity_CT)
    np.testing.assert_array_equal(one.specificity_CT, several.specificity_CT)


def test_a_sampled_range_is_close_and_its_counts_stay_exact(monkeypatch):
    rows, labels = gaussians(150, 10)
    exact = threshold_curves(rows, labels)
    monkeypatch.setattr(threshold_range, "SAMPLE", 200_000)
    sampled = threshold_curves(rows, labels)
    assert sampled.thresholds_T[0] != exact.thresholds_T[0]
    far = ((1 - sampled.specificity_CT) * sampled.negatives_C[:, None]).sum(0) / sampled.negatives_C.sum()
    assert far[[0, -1]] == pytest.approx([0.01, 0.10], rel=0.05)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    distances = np.sqrt(np.clip(2 - 2 * unit @ unit.T, 0, None))
    accepted = (distances <= sampled.thresholds_T[-1]) & (labels[:, None] != labels[None])
    counted = (1 - sampled.specificity_CT[:, -1]) * sampled.negatives_C
    np.testing.assert_allclose(counted, accepted.sum(1).reshape(150, 10).sum(1), atol=1e-6)
    np.testing.assert_array_equal(threshold_curves(rows, labels).thresholds_T, sampled.thresholds_T)


def test_a_bound_too_fine_for_the_sample_uses_every_negative(monkeypatch):
    rows, labels = gaussians(60, 5)
    exact = threshold_curves(rows, labels, far_range=(0.001, 0.1))
    monkeypatch.setattr(threshold_range, "SAMPLE", 20_000)
    np.testing.assert_array_equal(
        threshold_curves(rows, labels, far_range=(0.001, 0.1)).thresholds_T, exact.thresholds_T
    )


@pytest.mark.parametrize("c", [0.5, 1.0, 3.0])
def test_utility_and_scores_follow_their_formulas(c):
    curves = threshold_curves(*SETS["ragged"], far_range=(0.05, 0.4), num_thresholds=7)
    expected = oracle_utility(curves, c)
    np.testing.assert_allclose(utility(curves, c), expected, atol=1e-14)
    classes, total = expected.shape
    mean = [sum(expected[:, t]) / classes for t in range(total)]
    squares = [(expected[i, t] - mean[t]) ** 2 for i in range(classes) for t in range(total)]
    assert opis(curves, c) == pytest.approx(sum(squares) / len(squares), abs=1e-15)
    assert mean_utility(curves, c) == pytest.approx(sum(mean) / total)
    k = max(1, round(0.3 * classes))
    columns = [sorted(expected[:, t]) for t in range(total)]
    gaps = [(sum(column[-k:]) / k - sum(column[:k]) / k) ** 2 for column in columns]
    assert epsilon_opis(curves, 0.3, c) == pytest.approx(sum(gaps) / total, abs=1e-15)


def test_utility_is_zero_where_both_parts_are():
    assert utility(made_up([[0.0, 1.0, 0.0]], [[0.0, 1.0, 1.0]])).tolist() == [[0.0, 1.0, 0.0]]


def test_c_above_one_favours_sensitivity():
    curves = made_up([[0.9]], [[0.5]])
    assert utility(curves, 3.0)[0, 0] > utility(curves, 1.0)[0, 0] > utility(curves, 0.3)[0, 0]


def test_epsilon_opis_ranks_classes_anew_at_every_threshold():
    curves = made_up([[1.0, 0.5], [0.5, 1.0]], [[1.0, 1.0], [1.0, 1.0]])
    assert epsilon_opis(curves, 0.1) == pytest.approx((1 - 2 / 3) ** 2)


def test_opis_has_no_square_root_and_sqrt_opis_has():
    curves = made_up([[1.0], [0.5]], [[1.0], [1.0]])
    assert opis(curves) == pytest.approx(((1 - 2 / 3) / 2) ** 2)
    assert sqrt_opis(curves) == pytest.approx((1 - 2 / 3) / 2)


def test_opis_against_a_class_its_own_average():
    level = made_up([[1.0, 1.0], [0.5, 0.5]], np.ones((2, 2)))
    assert opis(level, reference="thresholds") == 0 < opis(level)
    alike = made_up([[1.0, 0.5], [1.0, 0.5]], np.ones((2, 2)))
    assert opis(alike) == 0 < opis(alike, reference="thresholds")
    assert sqrt_opis(alike, reference="thresholds") == pytest.approx((1 - 2 / 3) / 2)
    curves = threshold_curves(*SETS["ragged"], far_range=(0.05, 0.4), num_thresholds=7)
    expected = oracle_utility(curves, 2.0)
    squares = [(u - sum(row) / len(row)) ** 2 for row in expected.tolist() for u in row]
    assert opis(curves, 2.0, reference="thresholds") == pytest.approx(sum(squares) / len(squares), abs=1e-15)


def test_an_unknown_reference_is_named():
    with pytest.raises(ValueError, match="unknown reference 'class'; valid: classes, thresholds"):
        opis(made_up([[1.0]], [[1.0]]), reference="class")


def test_opis_is_zero_for_classes_that_are_copies_of_each_other():
    # Pairs of points around a circle: a turn maps every class onto the next.
    angle = np.repeat(np.arange(40) * 2 * np.pi / 40, 2) + np.tile([-0.02, 0.02], 40)
    rows, labels = np.stack([np.cos(angle), np.sin(angle)], 1), np.repeat(np.arange(40), 2)
    curves = threshold_curves(rows, labels, far_range=(0.02, 0.3))
    assert opis(curves) == pytest.approx(0, abs=1e-15)
    assert epsilon_opis(curves) == pytest.approx(0, abs=1e-15)


def test_opis_alone_rewards_collapse_and_mean_utility_tells():
    rows, labels = gaussians(60, 40, dim=16, spread=0.9)
    trained = threshold_curves(rows, labels)
    untrained = threshold_curves(np.random.default_rng(0).standard_normal(rows.shape), labels)
    assert opis(untrained) < opis(trained)
    assert mean_utility(untrained) < 0.15 < 0.7 < mean_utility(trained)


@pytest.mark.parametrize("pairs", [1, 6, 66, 2000])
def test_noise_floor_is_the_opis_of_equal_classes_with_binomial_counts(pairs):
    rng = np.random.default_rng(0)
    psi, phi, negatives = np.array([0.6, 0.9, 0.98]), np.array([0.99, 0.95, 0.9]), 500
    curves = made_up(
        rng.binomial(pairs, psi, (4000, 3)) / pairs,
        rng.binomial(negatives, phi, (4000, 3)) / negatives,
        pairs,
        negatives,
    )
    assert noise_floor(curves) == pytest.approx(opis(curves), rel=0.06)


def test_noise_floor_with_classes_of_many_sizes():
    rng = np.random.default_rng(0)
    pairs, negatives = rng.choice([1, 3, 45], 6000), rng.choice([100, 400], 6000)
    curves = made_up(
        rng.binomial(pairs, 0.7)[:, None] / pairs[:, None],
        rng.binomial(negatives, 0.95)[:, None] / negatives[:, None],
        pairs,
        negatives,
    )
    assert noise_floor(curves) == pytest.approx(opis(curves), rel=0.06)


def test_noise_floor_vanishes_where_nothing_is_left_to_chance():
    assert noise_floor(made_up(np.ones((5, 4)), np.ones((5, 4)))) == pytest.approx(0, abs=1e-12)
    assert noise_floor(made_up(np.zeros((5, 4)), np.ones((5, 4)))) == pytest.approx(0, abs=1e-12)


def test_few_samples_a_class_make_opis_by_themselves():
    # Classes alike but for where they lie. Nothing differs in truth, yet two samples a class give an OPIS of 0.02.
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((250, 32))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    scores, floors = {}, {}
    for samples in (2, 8, 40):
        labels = np.repeat(np.arange(250), samples)
        rows = centres[labels] + 0.155 * rng.standard_normal((len(labels), 32))
        curves = threshold_curves(rows.astype(np.float32), labels)
        scores[samples], floors[samples] = opis(curves), noise_floor(curves)
    assert 0.01 < scores[2] < 0.04
    assert floors[2] == pytest.approx(scores[2], rel=0.1)
    assert scores[2] > 10 * scores[8] > 20 * scores[40]
    # Many pairs of few samples are not independent, so the floor is a lower bound there.
    assert floors[8] < scores[8]
    assert floors[40] < scores[40]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(3, 8), samples=st.integers(3, 6))
def test_invariances(seed, classes, samples):
    rows, labels = gaussians(classes, samples, dim=5, seed=seed)
    rng = np.random.default_rng(seed)
    curves = threshold_curves(rows, labels, far_range=(0.1, 0.5), num_thresholds=11)
    order = rng.permutation(len(rows))
    turn = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    scale = 10.0 ** rng.uniform(-3, 3, (len(rows), 1))
    names = rng.permutation(100)[:classes] - 50
    for changed_rows, changed_labels in (
        (rows[order], labels[order]),
        (rows @ turn, labels),
        (rows * scale, labels),
        (rows, names[labels]),
    ):
        other = threshold_curves(changed_rows, changed_labels, far_range=(0.1, 0.5), num_thresholds=11)
        assert_same_thresholds(other.thresholds_T, curves.thresholds_T)
        assert opis(other) == pytest.approx(opis(curves), abs=2e-3)
        assert sorted(other.positives_C) == sorted(curves.positives_C)
    assert 0 <= opis(curves) <= 0.25
    assert (np.diff(curves.sensitivity_CT) >= 0).all()
    assert (np.diff(curves.specificity_CT) <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_width_is_computed_from_the_values_it_holds(dtype):
    rows, labels = gaussians(10, 6)
    held = torch.from_numpy(rows).to(dtype)
    curves = threshold_curves(held, torch.from_numpy(labels).to(torch.int16))
    same = threshold_curves(held.to(torch.float64), labels)
    assert_same_thresholds(curves.thresholds_T, same.thresholds_T)
    np.testing.assert_allclose(curves.sensitivity_CT, same.sensitivity_CT, atol=0.07)
    assert opis(curves) == pytest.approx(opis(same), rel=0.02)


def test_numpy_and_torch_agree_and_the_input_stays_as_it_was():
    rows, labels = gaussians(10, 6)
    kept = rows.copy()
    tensor = torch.from_numpy(rows).requires_grad_()
    a, b = threshold_curves(rows, labels), threshold_curves(tensor, torch.from_numpy(labels))
    with torch.inference_mode():
        c = threshold_curves(torch.from_numpy(rows).clone(), labels)
    np.testing.assert_array_equal(a.sensitivity_CT, b.sensitivity_CT)
    np.testing.assert_array_equal(a.sensitivity_CT, c.sensitivity_CT)
    np.testing.assert_array_equal(rows, kept)


def test_a_training_loops_low_precision_does_not_leak_in():
    rows, labels = gaussians(20, 8, dim=64)
    single = rows.astype(np.float32)
    plain = threshold_curves(single, labels)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            inside = threshold_curves(single, labels)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(plain.sensitivity_CT, inside.sensitivity_CT)
    np.testing.assert_array_equal(plain.thresholds_T, inside.thresholds_T)


def test_huge_and_tiny_rows_are_normalised():
    rows, labels = gaussians(8, 5)
    scale = np.where(np.arange(40)[:, None] % 2, 1e30, 1e-30)
    a, b = (threshold_curves(x.astype(np.float32), labels, far_range=(0.05, 0.4)) for x in (rows, rows * scale))
    assert_same_thresholds(a.thresholds_T, b.thresholds_T)


ROWS, LABELS = gaussians(6, 5)


def spoiled(row, value):
    rows = ROWS.copy()
    rows[row] = value
    return rows


@pytest.mark.parametrize(
    ("rows", "labels", "options", "message"),
    [
        (ROWS, LABELS[:-1], {}, r"\(30, 8\) and \(29,\)"),
        (ROWS[0], LABELS, {}, r"\(8,\) and \(30,\)"),
        (ROWS, LABELS[:, None], {}, r"\(30, 1\)"),
        (ROWS.astype(int), LABELS, {}, "must be floats, got torch.int64"),
        (ROWS, LABELS.astype(float), {}, "must be integers, got torch.float64"),
        (ROWS, LABELS > 2, {}, "must be integers, got torch.bool"),
        (spoiled(17, np.nan), LABELS, {}, "row 17 .* NaN or infinity"),
        (spoiled(4, -np.inf), LABELS, {}, "row 4 .* NaN or infinity"),
        (spoiled(9, 0.0), LABELS, {}, "row 9 .* only zeros"),
        (ROWS, np.zeros(30, int), {}, "at least two classes, got 1 in 30"),
        (ROWS, np.arange(30), {}, "at least two samples, got 30 classes"),
        (ROWS, LABELS, {"far_range": (0.1, 0.01)}, "0 < low < high < 1, got 0.1 and 0.01"),
        (ROWS, LABELS, {"far_range": (0.0, 0.1)}, "got 0 and 0.1"),
        (ROWS, LABELS, {"far_range": (0.1, 1.0)}, "got 0.1 and 1"),
        (ROWS, LABELS, {"far_range": (0.001, 0.1)}, r"FAR 0.001 cannot be reached: 375 negative .* below 0.00267"),
        (np.ones((30, 3)), LABELS, {}, "375 negative pairs resolve no FAR below 1"),
        (ROWS, LABELS, {"frr_range": (0.5, 0.1)}, "frr_range needs 0 < low < high < 1, got 0.5 and 0.1"),
        (ROWS, LABELS, {"frr_range": (0.001, 0.1)}, "FRR 0.001 .* 60 positive pairs resolve no FRR below 0.0167"),
        (ROWS, LABELS, {"distance_range": (0.5, 0.5)}, "distance_range needs 0 <= low < high <= 2, got 0.5 and 0.5"),
        (ROWS, LABELS, {"distance_range": (0.5, 2.5)}, "got 0.5 and 2.5"),
        (ROWS, LABELS, {"distance_range": (float("nan"), 1)}, "got nan and 1"),
        (ROWS, LABELS, {"far_range": (0.1, 0.2), "frr_range": (0.1, 0.2)}, "one of .* got far and frr"),
        (ROWS, LABELS, {"gallery": (ROWS, LABELS + 9)}, "gallery item of its label, got none among 30 queries"),
        (ROWS, LABELS, {"num_thresholds": 1}, "at least 2, got 1"),
        (ROWS, LABELS, {"distance": "euclidian"}, "unknown distance 'euclidian'; valid: euclidean, cosine"),
    ],
)
def test_bad_input_is_named(rows, labels, options, message):
    with pytest.raises(ValueError, match=message):
        threshold_curves(rows, labels, **options)


@pytest.mark.parametrize("epsilon", [0.0, 0.6, -1.0, float("nan")])
def test_epsilon_out_of_range(epsilon):
    with pytest.raises(ValueError, match="epsilon"):
        epsilon_opis(made_up([[1.0]], [[1.0]]), epsilon)


@pytest.mark.parametrize("c", [0.0, -1.0, float("nan")])
def test_utility_weight_out_of_range(c):
    with pytest.raises(ValueError, match="c must be positive"):
        utility(made_up([[1.0]], [[1.0]]), c)

"""Calibrated thresholds against a search over all pairs in float64."""

import json
from dataclasses import asdict, replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dml.metrics import class_rates
from dml.metrics.intervals import rate_interval, squared_residuals
from dml.metrics.operating_points import OperatingPoint, UnreachableFARError, calibrate, operating_point
from dml.metrics.pair_distances import PairDistances, pair_distances, rates_at
from dml.metrics.threshold import threshold_curves


def sample(classes=12, samples=6, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), samples)
    return rng.standard_normal((classes, dim))[labels] + 0.7 * rng.standard_normal((len(labels), dim)), labels


def one_huge_class():
    rows, labels = sample(20, 3, seed=4)
    labels[12:] = 5
    return rows, labels


def with_singletons():
    rows, labels = sample(seed=3)
    labels[1:5] = [100, 101, -7, 103]
    return rows, labels


def lattice():
    rng = np.random.default_rng(0)
    rows = rng.integers(-1, 2, (50, 4)).astype(float)
    rows[~rows.any(axis=1)] = 1.0
    return rows, rng.integers(0, 6, 50)


SETS = {
    "random": sample(),
    "singletons": with_singletons(),
    "one huge class": one_huge_class(),
    "ties and duplicates": lattice(),
}


def distances(rows, labels, distance):
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    split = {True: [], False: []}
    for i, j in combinations(range(len(rows)), 2):
        cosine = 1 - float(unit[i] @ unit[j])
        split[bool(labels[i] == labels[j])].append(cosine if distance == "cosine" else max(2 * cosine, 0) ** 0.5)
    return np.array(split[True]), np.sort(split[False])


def largest(positives, negatives, allowed):
    """The farthest pair before the first negative too many."""
    every = np.concatenate([positives, negatives])
    return every[every < negatives[allowed]].max()


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_largest_threshold_within_each_target(distance, seed):
    rows, labels = sample(seed=seed)
    positives, negatives = distances(rows, labels, distance)
    targets = (0.5, 0.1, 0.013, 0.001)
    for target, point in zip(targets, calibrate(rows, labels, far=targets, distance=distance), strict=True):
        allowed = int(target * len(negatives))
        assert point.far_target == target
        assert point.threshold == pytest.approx(largest(positives, negatives, allowed), abs=1e-5)
        assert point.far == allowed / len(negatives) == (negatives <= point.threshold).mean()
        assert point.frr == pytest.approx((positives > point.threshold).mean(), abs=1e-12)
        assert (point.positives, point.negatives) == (len(positives), len(negatives))


def test_ties_keep_far_below_the_target():
    # 24 negatives: 4 duplicates, 20 at a right angle.
    rows, labels = np.eye(4)[[0, 0, 1, 1, 0, 0, 2, 3]], np.array([0, 0, 1, 1, 2, 2, 3, 3])
    near, all_ = calibrate(rows, labels, far=(0.5, 0.9999))
    assert near.far == all_.far == 4 / 24
    assert near.threshold == pytest.approx(0, abs=2e-3)
    assert near.frr == 1 / 4  # the last class's two samples stand at a right angle


def test_points_agree_with_curves_on_the_same_pairs():
    rows, labels = (x.astype(t) for x, t in zip(sample(), (np.float32, np.int64), strict=True))
    low, high = calibrate(rows, labels, far=(0.01, 0.10))
    curves = threshold_curves(rows, labels, distance_range=(low.threshold, high.threshold))
    far = ((1 - curves.specificity_CT) * curves.negatives_C[:, None]).sum(0) / curves.negatives_C.sum()
    frr = 1 - (curves.sensitivity_CT * curves.positives_C[:, None]).sum(0) / curves.positives_C.sum()
    assert [low.far, high.far] == pytest.approx(far[[0, -1]])
    assert [low.frr, high.frr] == pytest.approx(frr[[0, -1]])


def test_tile_size_changes_nothing(monkeypatch):
    rows, labels = sample()
    whole = calibrate(rows, labels, far=(0.1, 0.01))
    monkeypatch.setattr("dml.metrics.pair_grid.TILE", 4)
    assert calibrate(rows, labels, far=(0.1, 0.01)) == whole


def test_a_point_is_plain_json_and_comes_back_from_it():
    (point,) = calibrate(*sample(), far=(np.float64(0.1),), distance="cosine")
    assert point.far_interval is not None
    assert point.frr_interval is not None
    assert OperatingPoint(**json.loads(json.dumps(asdict(point)))) == point


def test_a_point_registered_before_there_were_intervals_still_loads():
    known = {"far_target": 0.1, "threshold": 0.9, "far": 0.099, "frr": 0.02, "negatives": 1000, "positives": 50}
    point = OperatingPoint(**known)
    assert (point.distance, point.far_interval, point.frr_interval) == ("euclidean", None, None)


def count_between(rows, labels, threshold):
    """Accepted pairs of every two classes, above the diagonal, accepted positives on it."""
    classes = sorted(set(labels.tolist()))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    table = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for i, j in combinations(range(len(rows)), 2):
        if 2 - 2 * float(unit[i] @ unit[j]) <= threshold**2:
            a, b = sorted((classes.index(labels[i]), classes.index(labels[j])))
            table[a, b] += 1
    return table, np.array([(labels == label).sum() for label in classes])


@pytest.mark.parametrize("tile", [4, 512])
@pytest.mark.parametrize("name", SETS)
def test_intervals_are_made_of_the_counts_between_classes(name, tile, monkeypatch):
    monkeypatch.setattr("dml.metrics.pair_grid.TILE", tile)
    rows, labels = SETS[name]
    (point,) = calibrate(rows, labels, far=(0.1,))
    table, sizes = count_between(rows, labels, point.threshold)
    positives, classes = sizes * (sizes - 1) // 2, len(sizes)
    negatives = np.triu(table, 1)
    assert point.far_interval == rate_interval(
        negatives.sum(axis=0) + negatives.sum(axis=1),
        sizes * (sizes.sum() - sizes),
        ends=2,
        squares=squared_residuals(negatives, sizes),
        trials=classes * (classes - 1) // 2,
    )
    assert point.frr_interval == rate_interval(positives - table.diagonal(), positives)
    assert point.far == negatives.sum() / point.negatives
    assert point.far_interval[0] < point.far < point.far_interval[1]
    assert point.frr_interval[0] <= point.frr <= point.frr_interval[1]


def test_with_very_many_classes_no_table_is_made_and_the_interval_errs_to_the_wide_side(monkeypatch):
    rows, labels = sample()
    (table,) = calibrate(rows, labels, far=(0.1,))
    monkeypatch.setattr(class_rates, "TABLE", 11)
    monkeypatch.setattr(class_rates, "accepted_tables", None)
    (plain,) = calibrate(rows, labels, far=(0.1,))
    assert replace(plain, far_interval=table.far_interval) == table
    (low, high), (wide_low, wide_high) = ([log_odds(x) for x in point.far_interval] for point in (table, plain))
    assert wide_low < low < high < wide_high
    assert wide_high - wide_low <= 2**0.5 * (high - low) + 1e-9


def log_odds(rate):
    return np.log(rate / (1 - rate))


def test_two_classes_are_too_few_for_an_interval_of_the_far():
    rows, labels = sample(classes=2, samples=12, dim=3)
    (point,) = calibrate(rows, labels, far=(0.2,))
    assert point.far_interval is None
    assert point.frr_interval is not None


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_queries_against_a_gallery(distance):
    rows, labels = sample(classes=14, samples=6)
    asked = np.arange(len(rows)) % 6 < 2
    known = ~asked & (labels > 1)  # the first two classes are unknown to the gallery
    gallery = (rows[known], labels[known])
    (point,) = calibrate(rows[asked], labels[asked], far=(0.05,), gallery=gallery, distance=distance)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    counts = {
        label: [0, 0, 0, 0] for label in range(14)
    }  # accepted negatives, negatives, rejected positives, positives
    for i in np.flatnonzero(asked):
        for j in np.flatnonzero(known):
            cosine = 1 - float(unit[i] @ unit[j])
            near = (cosine if distance == "cosine" else (2 * cosine) ** 0.5) <= point.threshold
            positive = labels[i] == labels[j]
            count = counts[labels[i]]
            count[2 * positive] += near != positive
            count[2 * positive + 1] += 1
    accepted, negatives, rejected, positives = np.array(list(counts.values())).T
    assert (point.negatives, point.positives) == (negatives.sum(), positives.sum())
    assert point.far == accepted.sum() / negatives.sum() <= 0.05 < (accepted.sum() + 1) / negatives.sum()
    assert point.frr == pytest.approx(rejected.sum() / positives.sum(), abs=1e-15)
    # The gallery stays as it is: only the classes of the queries are drawn again.
    assert point.far_interval == rate_interval(accepted, negatives)
    assert point.frr_interval == rate_interval(rejected[positives > 0], positives[positives > 0])


def test_a_threshold_is_chosen_from_pairs_alone():
    pairs = pair_distances(*sample())
    (point,) = calibrate(*sample(), far=(0.1,))
    assert operating_point(pairs, 0.1) == replace(point, far_interval=None, frr_interval=None)
    assert rates_at(pairs, point.threshold) == (point.far, point.frr)


def test_positives_before_the_next_negative_are_accepted_at_no_cost():
    pairs = PairDistances(np.array([0.1, 0.2, 0.3, 0.4]), np.array([5, 0, 3, 1]), np.array([0, 1, 0, 9]), "euclidean")
    for target in (0.1, 0.5):
        point = operating_point(pairs, target)
        assert (point.threshold, point.far, point.frr) == (0.3, 0.1, 1 / 9)
    with pytest.raises(UnreachableFARError, match=r"FAR 0[.]09 cannot be reached"):
        operating_point(pairs, 0.09)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(3, 7), samples=st.integers(3, 5))
def test_invariances(seed, classes, samples):
    rows, labels = sample(classes, samples, dim=4, seed=seed)
    rng = np.random.default_rng(seed)
    (before,) = calibrate(rows, labels, far=(0.3,))
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
        (after,) = calibrate(changed_rows, changed_labels, far=(0.3,))
        assert after.threshold**2 == pytest.approx(before.threshold**2, abs=5e-6)
        assert (after.far, after.frr) == pytest.approx((before.far, before.frr), abs=0.02)
        assert after.far_interval == pytest.approx(before.far_interval, abs=0.05)


def test_a_target_finer_than_the_negatives_resolve():
    with pytest.raises(
        UnreachableFARError, match=r"FAR 0.0001 cannot be reached: 2,376 negative pairs .* below 0.000421"
    ):
        calibrate(*sample(), far=(0.1, 1e-4))


@pytest.mark.parametrize("target", [0.0, 1.0, -0.1, float("nan")])
def test_a_target_that_is_no_rate(target):
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibrate(*sample(), far=(target,))


def test_embeddings_that_are_all_equal():
    with pytest.raises(UnreachableFARError, match=r"24 negative pairs resolve no FAR below 1$"):
        calibrate(np.ones((8, 3)), np.arange(8) // 2)


def test_an_unknown_distance():
    with pytest.raises(ValueError, match="unknown distance 'manhattan'; valid: euclidean, cosine"):
        calibrate(*sample(), distance="manhattan")


def test_no_targets_give_no_points():
    assert calibrate(*sample(), far=()) == ()

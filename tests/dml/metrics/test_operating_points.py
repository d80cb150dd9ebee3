"""Calibrated thresholds against a search over all pairs in float64."""

import json
from dataclasses import asdict
from itertools import combinations

import numpy as np
import pytest

from dml.metrics.operating_points import calibrate
from dml.metrics.threshold import threshold_curves


def sample(classes=12, samples=6, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), samples)
    return rng.standard_normal((classes, dim))[labels] + 0.7 * rng.standard_normal((len(labels), dim)), labels


def distances(rows, labels, distance):
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    split = {True: [], False: []}
    for i, j in combinations(range(len(rows)), 2):
        cosine = 1 - float(unit[i] @ unit[j])
        split[bool(labels[i] == labels[j])].append(cosine if distance == "cosine" else max(2 * cosine, 0) ** 0.5)
    return np.array(split[True]), np.sort(split[False])


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_largest_threshold_within_each_target(distance, seed):
    rows, labels = sample(seed=seed)
    positives, negatives = distances(rows, labels, distance)
    targets = (0.5, 0.1, 0.013, 0.001)
    for target, point in zip(targets, calibrate(rows, labels, far=targets, distance=distance), strict=True):
        allowed = int(target * len(negatives))
        assert point.far_target == target
        assert point.threshold == pytest.approx(negatives[allowed - 1], abs=1e-5)
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
    curves = threshold_curves(rows, labels)
    assert [low.threshold, high.threshold] == curves.thresholds_T[[0, -1]].tolist()
    far = ((1 - curves.specificity_CT) * curves.negatives_C[:, None]).sum(0) / curves.negatives_C.sum()
    frr = 1 - (curves.sensitivity_CT * curves.positives_C[:, None]).sum(0) / curves.positives_C.sum()
    assert [low.far, high.far] == pytest.approx(far[[0, -1]])
    assert [low.frr, high.frr] == pytest.approx(frr[[0, -1]])


def test_tile_size_changes_nothing(monkeypatch):
    rows, labels = sample()
    whole = calibrate(rows, labels, far=(0.1, 0.01))
    monkeypatch.setattr("dml.metrics.pair_counts.TILE", 4)
    assert calibrate(rows, labels, far=(0.1, 0.01)) == whole


def test_a_point_is_plain_json():
    (point,) = calibrate(*sample(), far=(np.float64(0.1),))
    assert json.loads(json.dumps(asdict(point))) == asdict(point)


def test_a_target_finer_than_the_negatives_resolve():
    with pytest.raises(ValueError, match=r"FAR 0.0001 cannot be reached: 2,376 negative pairs .* below 0.000421"):
        calibrate(*sample(), far=(0.1, 1e-4))


@pytest.mark.parametrize("target", [0.0, 1.0, -0.1, float("nan")])
def test_a_target_that_is_no_rate(target):
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibrate(*sample(), far=(target,))

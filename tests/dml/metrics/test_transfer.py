"""What thresholds do on other classes, against plain loops over pairs."""

import json
from dataclasses import asdict, replace
from itertools import combinations

import numpy as np
import pytest

from dml.metrics.operating_points import OperatingPoint, calibrate
from dml.metrics.transfer import QUANTILES, transfer


def sample(classes=15, samples=5, dim=6, seed=0, differ=0.0):
    """Classes whose own spread differs."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), samples)
    spread = 0.6 * np.exp(differ * rng.standard_normal((classes, 1)))
    return rng.standard_normal((classes, dim))[labels] + spread[labels] * rng.standard_normal(
        (len(labels), dim)
    ), labels


def with_singletons():
    rows, labels = sample(seed=3)
    labels[1:5] = [100, 101, -7, 103]  # and class 0 is left with one
    return rows, labels


def one_huge_class():
    rows, labels = sample(20, 3, seed=4)
    labels[12:] = 5
    return rows, labels


def lattice():
    rng = np.random.default_rng(0)
    rows = rng.integers(-1, 2, (50, 4)).astype(float)
    rows[~rows.any(axis=1)] = 1.0
    return rows, rng.integers(0, 6, 50)


SETS = {
    "random": sample(differ=0.6),
    "singletons": with_singletons(),
    "one huge class": one_huge_class(),
    "ties and duplicates": lattice(),
    "all equal": (np.ones((8, 3)), np.arange(8) // 2),
}
POINTS = calibrate(*sample(seed=100), far=(0.1, 0.01, 0.3))  # in no order


def oracle(rows, labels, threshold, gallery=None):
    """Accepted negatives, negatives, rejected positives, positives of every class."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    counts = {label: [0, 0, 0, 0] for label in sorted(set(labels.tolist()))}
    if gallery is None:
        pairs = [(unit[i], unit[j], (labels[i], labels[j])) for i, j in combinations(range(len(rows)), 2)]
    else:
        items = gallery[0] / np.linalg.norm(gallery[0], axis=1, keepdims=True)
        pairs = [
            (x, y, (a, b)) for x, a in zip(unit, labels, strict=True) for y, b in zip(items, gallery[1], strict=True)
        ]
    for x, y, (a, b) in pairs:
        near = 2 - 2 * float(x @ y) <= threshold**2
        if a == b:
            counts[a][2] += not near
            counts[a][3] += 1
        else:
            for label in (a, b) if gallery is None else (a,):
                counts[label][0] += near
                counts[label][1] += 1
    return np.array(list(counts.values())).T


def share(part, whole):
    return [a / m if m else np.nan for a, m in zip(part, whole, strict=True)]


@pytest.mark.parametrize("name", SETS)
def test_rates_of_all_classes_and_of_each_equal_counting(name):
    rows, labels = SETS[name]
    for point, found in zip(POINTS, transfer(POINTS, rows, labels), strict=True):
        assert (found.far_target, found.threshold, found.distance) == (point.far_target, point.threshold, "euclidean")
        accepted, negatives, rejected, positives = oracle(rows, labels, point.threshold)
        assert found.far == accepted.sum() / negatives.sum()
        assert found.frr == rejected.sum() / positives.sum()
        assert (found.negatives, found.positives) == (negatives.sum() / 2, positives.sum())
        assert found.labels_C.tolist() == sorted(set(labels.tolist()))
        np.testing.assert_array_equal(found.far_C, share(accepted, negatives))
        np.testing.assert_array_equal(found.frr_C, share(rejected, positives))
        for rates, quantiles in ((found.far_C, found.far_quantiles), (found.frr_C, found.frr_quantiles)):
            known = rates[~np.isnan(rates)]
            assert quantiles == {q: pytest.approx(np.quantile(known, q)) for q in QUANTILES}


def test_queries_against_a_gallery_of_which_some_classes_are_unknown():
    rows, labels = SETS["random"]
    asked = np.arange(len(rows)) % 5 < 2
    known = ~asked & (labels > 1)
    gallery = (rows[known], labels[known])
    for point, found in zip(POINTS, transfer(POINTS, rows[asked], labels[asked], gallery=gallery), strict=True):
        accepted, negatives, rejected, positives = oracle(rows[asked], labels[asked], point.threshold, gallery)
        assert found.far == accepted.sum() / negatives.sum()
        assert found.frr == rejected.sum() / positives.sum()
        np.testing.assert_array_equal(found.far_C, share(accepted, negatives))
        np.testing.assert_array_equal(found.frr_C, share(rejected, positives))
        assert np.isnan(found.frr_C[:2]).all()


def test_on_the_calibration_set_itself_the_points_come_back():
    rows, labels = sample(seed=100)
    for point, found in zip(POINTS, transfer(POINTS, rows, labels), strict=True):
        plain = {name: getattr(found, name) for name in asdict(point)}
        assert OperatingPoint(**plain) == point


def test_points_in_different_distances_keep_their_own():
    euclidean = POINTS[0]
    cosine = replace(euclidean, threshold=euclidean.threshold**2 / 2, distance="cosine")
    a, b = transfer((euclidean, cosine), *SETS["random"])
    assert (a.far, a.frr) == (b.far, b.frr)
    assert (a.distance, b.distance) == ("euclidean", "cosine")


def test_the_worst_classes_by_name():
    # Class 2 lies on class 0; class 1 is torn apart.
    near, far_ = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]
    rows = np.array([near, near, far_, [0.0, 0.0, 1.0], near, [-1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    labels = np.array([0, 0, 1, 1, 2, 7, 7])
    point = replace(POINTS[0], threshold=0.5)
    (found,) = transfer((point,), rows, labels, names={0: "ant", 1: "bee", 2: "cat", 7: "dog"}, worst=2)
    assert found.worst_far == (("cat", 2 / 6, None), ("ant", 2 / 10, 0.0))
    assert found.worst_frr == (("bee", 0.0, 1.0), ("ant", 2 / 10, 0.0))
    (unnamed,) = transfer((point,), rows, labels)
    assert [worst.name for worst in unnamed.worst_far] == ["2", "0", "1", "7"]
    assert [worst.name for worst in unnamed.worst_frr] == ["1", "0", "7"]  # class 2 has no positives
    (listed,) = transfer((point,), rows, labels, names=[*"abcdefgh"], worst=1)
    assert [worst.name for worst in listed.worst_far] == ["c"]


def test_json():
    rows, labels = with_singletons()
    (found,) = transfer(POINTS[:1], rows, labels, worst=3)
    plain = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert plain["far"] == found.far
    assert plain["far_interval"] == list(found.far_interval)
    assert plain["frr_quantiles"]["0.5"] == found.frr_quantiles[0.5]
    assert len(plain["worst_far"]) == 3
    assert set(plain["worst_far"][0]) == {"name", "far", "frr"}
    assert not [name for name in plain if name.endswith("_C")]


def test_nothing_accepted_still_has_an_upper_end():
    (found,) = transfer((replace(POINTS[0], threshold=0.0),), *SETS["random"])
    assert (found.far, found.frr) == (0.0, 1.0)
    assert found.far_interval == (0.0, pytest.approx(1 - 0.025 ** (1 / (15 * 14 / 2))))
    assert found.frr_interval == (pytest.approx(0.025 ** (1 / 15)), 1.0)


def test_no_points_give_nothing():
    assert transfer((), *SETS["random"]) == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ["a", "b"]}, r"label 2 has no name \(13 of 15 labels; 2 names\)"),
        ({"names": {5: "five"}}, r"label 0 has no name \(14 of 15 labels; 1 names\)"),
        ({"worst": -1}, "0 or more classes, got -1"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        transfer(POINTS, *SETS["random"], **options)


def test_a_threshold_that_is_no_distance():
    with pytest.raises(ValueError, match="0 or more, got -1"):
        transfer((replace(POINTS[0], threshold=-1.0),), *SETS["random"])

"""Labelled pairs from a CSV file: what is read, what is refused, and rates against plain loops."""

import json
from dataclasses import asdict
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dml.metrics.intervals import rate_interval
from dml.metrics.labelled_pairs import (
    LabelledPairs,
    calibrate_labelled,
    labelled_pair_distances,
    read_pairs,
    transfer_labelled,
)
from dml.metrics.operating_points import UnreachableFARError, calibrate, operating_point
from dml.metrics.pair_distances import pair_distances, rates_at


def sample(classes=10, samples=5, dim=6, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), samples)
    rows = rng.standard_normal((classes, dim))[labels] + 0.7 * rng.standard_normal((len(labels), dim))
    return rows.astype(dtype), labels, [f"image {i}" for i in range(len(labels))]


def some_pairs(labels, names, share=0.4, seed=0):
    rng = np.random.default_rng(seed)
    chosen = [pair for pair in combinations(range(len(labels)), 2) if rng.random() < share]
    a, b = (tuple(names[pair[end]] for pair in chosen) for end in (0, 1))
    return LabelledPairs(a, b, tuple(bool(labels[i] == labels[j]) for i, j in chosen))


def write(folder, text, encoding="utf-8"):
    path = folder / "pairs.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_every_way_to_say_the_same(tmp_path):
    text = "a,b,same\nx,y,1\nx,z,0\ny,z,False\nu,v,TRUE\nu,x,yes\nu,y,No\n"
    pairs = read_pairs(write(tmp_path, text))
    assert pairs == LabelledPairs(
        ("x", "x", "y", "u", "u", "u"),
        ("y", "z", "z", "v", "x", "y"),
        (True, False, False, True, True, False),
        (2, 3, 4, 5, 6, 7),
    )
    assert len(pairs) == 6


def test_columns_in_any_order_among_others_and_names_as_csv_quotes_them(tmp_path):
    text = '\ufeffsame,who,b,a\r\n1,me,"b, with a comma", a \r\n\r\n0,you,"täst ""q""",a\r\n'
    pairs = read_pairs(str(write(tmp_path, text)))
    assert pairs == LabelledPairs(("a", "a"), ("b, with a comma", 'täst "q"'), (True, False), (2, 4))


def test_a_pair_given_twice_counts_once(tmp_path):
    pairs = read_pairs(write(tmp_path, "a,b,same\nx,y,1\ny,x,true\nx,z,0\nx,y,1\n"))
    assert (pairs.a, pairs.b, pairs.same) == (("x", "x"), ("y", "z"), (True, False))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"header with the columns a,b,same, each once, got an empty file"),
        ("a,b\nx,y\n", r"header with the columns a,b,same, each once, got a,b$"),
        ("a,b,a,same\nx,y,x,1\n", r"each once, got a,b,a,same$"),
        ("x,y,1\nx,z,0\n", r"got x,y,1$"),
        ("a,b,same\n", r"holds no pairs"),
        ("a,b,same\nx,y,1\nx,z,maybe\n", r"row 3: same is 'maybe'; valid: 1, true, yes, 0, false, no"),
        ("a,b,same\nx,y,\n", r"row 2: same is ''"),
        ("a,b,same\nx,y\n", r"row 2: has more or fewer fields"),
        ("a,b,same\nx,y,1,0\n", r"row 2: has more or fewer fields"),
        ("a,b,same\nx,,1\n", r"row 2: b is empty"),
        ("a,b,same\nx,y,1\n\nz,z,1\n", r"row 4: 'z' is paired with itself"),
        ("a,b,same\nx,y,1\nx,z,0\ny,x,0\n", r"row 4: 'y' and 'x' are labelled 0 here and 1 in row 2"),
        ('a,b,same\n"x"y,z,1\n', r"not a CSV file in UTF-8 after row 1"),
    ],
)
def test_what_is_no_list_of_pairs_is_refused_with_its_row(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(write(tmp_path, text))


def test_another_encoding_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a CSV file in UTF-8"):
        read_pairs(write(tmp_path, "a,b,same\nä,y,1\n", "latin-1"))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_all_pairs_labelled_are_the_pairs_of_the_classes(distance):
    rows, labels, names = sample()
    every = some_pairs(labels, names, share=1.0)
    found = labelled_pair_distances(every, names, rows, distance=distance)
    expected = pair_distances(rows, labels, distance=distance)
    for field in ("distances_M", "positives_M", "negatives_M"):
        np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
    for ours, theirs in zip(
        calibrate_labelled(every, names, rows, distance=distance, far=(0.1, 0.02)),
        calibrate(rows, labels, distance=distance, far=(0.1, 0.02)),
        strict=True,
    ):
        assert (ours.threshold, ours.far, ours.frr) == (theirs.threshold, theirs.far, theirs.frr)
        # All positives are labelled, so the labels tell the classes.
        assert ours.far_interval == pytest.approx(theirs.far_interval, abs=1e-12)
        assert ours.frr_interval == pytest.approx(theirs.frr_interval, abs=1e-12)


def oracle(pairs, names, rows, threshold):
    """Of negatives then of positives: for every pair its two items and whether the threshold gets it wrong."""
    where, split = {name: i for i, name in enumerate(names)}, ([], [])
    for a, b, same in zip(pairs.a, pairs.b, pairs.same, strict=True):
        x, y = rows[where[a]], rows[where[b]]
        cosine = sum(x * y) / (sum(x * x) * sum(y * y)) ** 0.5
        near = max(2 - 2 * cosine, 0) ** 0.5 <= threshold
        split[same].append((where[a], where[b], bool(near != same)))
    return split


def oracle_classes(positives):
    """Items that chains of positives connect, merged step by step; every other item for itself."""
    group = {}
    for a, b, _ in positives:
        merged = group.get(a, {a}) | group.get(b, {b})
        group |= dict.fromkeys(merged, merged)
    return lambda item: min(group.get(item, {item}))


def oracle_interval(pairs, class_of, ends):
    """Leave out one class after the other, from the list of pairs."""
    known = [(class_of(a), class_of(b), wrong) for a, b, wrong in pairs]
    classes = sorted({one for a, b, _ in known for one in (a, b)})
    hits = [sum(wrong for a, b, wrong in known if one in (a, b)) for one in classes]
    totals = [sum(one in (a, b) for a, b, _ in known) for one in classes]
    rate = sum(wrong for *_, wrong in known) / len(known)
    between = {frozenset((a, b)): [] for a, b, _ in known}
    for a, b, wrong in known:
        between[frozenset((a, b))].append(wrong)
    squares = sum((sum(each) - rate * len(each)) ** 2 for each in between.values()) if ends == 2 else 0.0
    return rate_interval(np.array(hits), np.array(totals), ends=ends, squares=squares, trials=len(between))


@pytest.mark.parametrize("seed", [0, 1])
def test_rates_and_intervals_equal_plain_loops(seed):
    rows, labels, names = sample(seed=seed)
    pairs = some_pairs(labels, names, seed=seed)
    points = calibrate_labelled(pairs, names, rows, far=(0.2, 0.02))
    by_distance = labelled_pair_distances(pairs, names, rows)
    for point, rates in zip(points, transfer_labelled(points, pairs, names, rows), strict=True):
        negatives, positives = oracle(pairs, names, rows, point.threshold)
        class_of = oracle_classes(positives)
        for wrong, ends, rate, interval in (
            (negatives, 2, rates.far, rates.far_interval),
            (positives, 1, rates.frr, rates.frr_interval),
        ):
            assert rate == sum(hit for *_, hit in wrong) / len(wrong)
            assert interval == pytest.approx(oracle_interval(wrong, class_of, ends))
        assert asdict(rates) == asdict(point)
        assert rates_at(by_distance, point.threshold) == (point.far, point.frr)
        assert point.far == int(point.far_target * len(negatives)) / len(negatives)
        assert json.loads(json.dumps(asdict(rates)))["far"] == rates.far


def test_points_calibrated_on_classes_hold_for_pairs_without_retraining():
    rows, labels, _ = sample()
    points = calibrate(rows, labels, far=(0.1, 0.01))
    other_rows, other_labels, other_names = sample(seed=7)
    pairs = some_pairs(other_labels, other_names)
    for point, rates in zip(points, transfer_labelled(points, pairs, other_names, other_rows), strict=True):
        by_distance = labelled_pair_distances(pairs, other_names, other_rows)
        assert (rates.far, rates.frr) == rates_at(by_distance, point.threshold)
        assert rates.far_target == point.far_target


def test_pairs_that_share_no_item_are_independent():
    # 200 disjoint pairs of each kind, and a tenth of the negatives accepted: the binomial's variance.
    angles = np.concatenate([np.zeros(200), np.full(20, 0.1), np.full(180, 1.5), np.zeros(200), np.full(200, 0.2)])
    rows, names = np.stack([np.cos(angles), np.sin(angles)], 1), [str(i) for i in range(800)]
    a = (*names[:200], *names[400:600])
    b = (*names[200:400], *names[600:])
    pairs = LabelledPairs(a, b, (False,) * 200 + (True,) * 200)
    (point,) = calibrate_labelled(pairs, names, rows, far=(0.1,))
    low, high = (np.log(x / (1 - x)) for x in point.far_interval)
    assert high - low == pytest.approx(2 * 1.966 / (0.09 * 200) ** 0.5, rel=0.01)
    assert point.frr_interval == pytest.approx((0, 1 - 0.025 ** (1 / 200))) if point.frr == 0 else point.frr == 1


def test_an_item_in_many_pairs_makes_the_interval_wider():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((101, 3))
    names = [str(i) for i in range(101)]
    spread = LabelledPairs(tuple(names[:50]), tuple(names[50:100]), (True, *[False] * 49))
    hub = LabelledPairs(("100",) * 50, tuple(names[50:100]), (True, *[False] * 49))
    (independent,), (shared,) = (calibrate_labelled(pairs, names, rows, far=(0.3,)) for pairs in (spread, hub))
    assert independent.far == shared.far
    assert independent.far_interval is not None
    assert shared.far_interval is None  # without item 100 no pair is left: one item tells nothing of others


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_float_widths(dtype):
    rows, labels, names = sample()
    held = torch.from_numpy(rows).to(dtype)
    pairs = some_pairs(labels, names)
    found, expected = (labelled_pair_distances(pairs, names, x) for x in (held, held.double()))
    assert found.auc == pytest.approx(expected.auc, abs=1e-3)
    assert operating_point(found, 0.1).threshold == pytest.approx(operating_point(expected, 0.1).threshold, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_invariances(seed):
    rows, labels, names = sample(classes=5, samples=4, dim=4, seed=seed)
    rng = np.random.default_rng(seed)
    pairs = some_pairs(labels, names, share=0.7, seed=seed)
    before = labelled_pair_distances(pairs, names, rows)
    order, shuffled = rng.permutation(len(rows)), rng.permutation(len(pairs))
    columns = (tuple(column[i] for i in shuffled) for column in (pairs.b, pairs.a, pairs.same))
    turn = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    for after in (
        labelled_pair_distances(pairs, [names[i] for i in order], rows[order]),
        labelled_pair_distances(LabelledPairs(*columns), names, rows),
        labelled_pair_distances(pairs, names, rows @ turn * 10.0 ** rng.uniform(-3, 3, (len(rows), 1))),
    ):
        assert (after.positives, after.negatives) == (before.positives, before.negatives)
        each = [np.repeat(x.distances_M, x.positives_M + x.negatives_M) for x in (before, after)]
        np.testing.assert_allclose(each[0] ** 2, each[1] ** 2, atol=5e-6)


ROWS, LABELS, NAMES = sample(classes=4, samples=3)
PAIRS = some_pairs(LABELS, NAMES)


@pytest.mark.parametrize(
    ("pairs", "names", "rows", "message"),
    [
        (PAIRS, NAMES[:-1], ROWS, r"got 11 names and 12 embeddings"),
        (PAIRS, [*NAMES[:-1], "image 0"], ROWS, r"the name 'image 0' is given to several embeddings"),
        (LabelledPairs(("image 0",), ("nobody",), (True,)), NAMES, ROWS, r"pair 0, .* b is 'nobody', which names no"),
        (LabelledPairs(("me",), ("image 0",), (True,), (7,)), NAMES, ROWS, r"row 7: a is 'me', .* \(12 names\)"),
        (LabelledPairs(("image 0",), ("image 1",), (True,)), NAMES, ROWS, r"none of 1 is labelled as not the same"),
        (LabelledPairs(("image 0",), ("image 1",), (False,)), NAMES, ROWS, r"none of 1 is labelled as the same"),
        (PAIRS, NAMES, ROWS[0], r"\(N, D\) of floats, got \(6,\)"),
        (PAIRS, NAMES, ROWS.astype(int), r"of floats, got .* of torch.int64"),
        (PAIRS, NAMES, ROWS * (np.arange(12) != 5)[:, None], r"row 5 of the embeddings holds only zeros"),
    ],
)
def test_bad_input_is_named(pairs, names, rows, message):
    with pytest.raises(ValueError, match=message):
        labelled_pair_distances(pairs, names, rows)


def test_targets_that_cannot_be():
    with pytest.raises(UnreachableFARError, match=r"FAR 0.0001 cannot be reached: \d+ negative pairs"):
        calibrate_labelled(PAIRS, NAMES, ROWS, far=(1e-4,))
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        calibrate_labelled(PAIRS, NAMES, ROWS, far=(2,))
    with pytest.raises(ValueError, match="unknown distance"):
        calibrate_labelled(PAIRS, NAMES, ROWS, distance="l1")

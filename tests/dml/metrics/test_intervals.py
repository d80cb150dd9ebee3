"""Intervals over classes: against plain loops, and against the truth of populations whose classes differ."""

import functools
import math

import numpy as np
import pytest
from scipy.stats import beta, t

from dml.metrics.intervals import rate_interval, squared_residuals


def table_of(classes=7, seed=0, rate=0.2):
    """Accepted pairs between classes of 1 to 6 samples, above the diagonal, and the sizes."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 7, classes)
    easy = rng.uniform(0.2, 2.0, classes)
    hits = rng.binomial(np.outer(sizes, sizes), np.clip(rate * np.outer(easy, easy), 0, 1))
    return np.triu(hits, 1), sizes


def both_ends(table):
    return table.sum(axis=0) + table.sum(axis=1)


def far_interval(table, sizes, squares=True):
    return rate_interval(
        both_ends(table),
        sizes * (sizes.sum() - sizes),
        ends=2,
        squares=squared_residuals(table, sizes) if squares else 0.0,
        trials=len(sizes) * (len(sizes) - 1) // 2,
    )


def oracle(table, sizes, squares):
    """Delete one class after the other from a list of pairs of classes; interval on the log odds."""
    classes = range(len(sizes))
    pairs = [(i, j, int(table[i, j]), int(sizes[i] * sizes[j])) for i in classes for j in classes if i < j]

    def rate(left_out=None):
        kept = [(a, m) for i, j, a, m in pairs if left_out not in (i, j)]
        return sum(a for a, _ in kept) / sum(m for _, m in kept)

    without = [rate(i) for i in classes]
    mean = sum(without) / len(without)
    variance = (len(without) - 1) / len(without) * sum((x - mean) ** 2 for x in without)
    if squares:
        twice = sum((a - rate() * m) ** 2 for _, _, a, m in pairs) / sum(m for *_, m in pairs) ** 2
        variance = max(variance - twice, variance / 2)
    reach = t.ppf(0.975, len(without) - 1) * math.sqrt(variance) / (rate() * (1 - rate()))
    odds = [math.exp(math.log(rate() / (1 - rate())) + sign * reach) for sign in (-1, 1)]
    return tuple(x / (1 + x) for x in odds)


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_jackknife_of_pairs_with_two_ends_equals_plain_loops(seed, squares):
    table, sizes = table_of(classes=4 + seed, seed=seed)
    assert far_interval(table, sizes, squares) == pytest.approx(oracle(table, sizes, squares), rel=1e-9)


def test_the_jackknife_of_pairs_with_one_end_equals_plain_loops():
    hits, totals = np.array([3, 0, 1, 9, 2]), np.array([10, 1, 3, 15, 6])
    rate = hits.sum() / totals.sum()
    without = [(hits.sum() - a) / (totals.sum() - m) for a, m in zip(hits, totals, strict=True)]
    variance = 4 / 5 * sum((x - sum(without) / 5) ** 2 for x in without)
    reach = t.ppf(0.975, 4) * math.sqrt(variance) / (rate * (1 - rate))
    expected = [1 / (1 + math.exp(-(math.log(rate / (1 - rate)) + sign * reach))) for sign in (-1, 1)]
    assert rate_interval(hits, totals) == pytest.approx(expected, rel=1e-9)


def test_classes_without_a_pair_are_passed_over():
    hits, totals = np.array([3, 0, 1, 9, 2]), np.array([10, 1, 3, 15, 6])
    padded = rate_interval(np.insert(hits, [0, 2, 5], 0), np.insert(totals, [0, 2, 5], 0))
    assert padded == rate_interval(hits, totals)


@pytest.mark.parametrize("trials", [1, 20, 4950])
def test_a_rate_of_zero_or_one_has_the_exact_binomial_interval(trials):
    totals = np.full(100, 6)
    low, high = rate_interval(np.zeros(100, int), totals, trials=trials)
    assert (low, high) == (0.0, pytest.approx(beta.ppf(0.975, 1, trials)))
    low, high = rate_interval(totals, totals, trials=trials)
    assert (low, high) == (pytest.approx(beta.ppf(0.025, trials, 1)), 1.0)


def test_classes_that_are_all_alike_still_leave_the_doubt_of_their_pairs():
    low, high = rate_interval(np.full(20, 3), np.full(20, 6))
    assert low < 0.5 - 0.08 < 0.5 + 0.08 < high


def test_taking_off_what_is_counted_twice_halves_the_variance_at_most():
    table, sizes = table_of(classes=30, rate=0.002, seed=3)
    logit = [[math.log(x / (1 - x)) for x in far_interval(table, sizes, squares)] for squares in (False, True)]
    wide, narrow = (high - low for low, high in logit)
    assert wide / math.sqrt(2) <= narrow * (1 + 1e-12) < wide


@pytest.mark.parametrize(
    ("hits", "totals", "ends"),
    [
        ([1], [3], 1),  # one class
        ([2, 2], [4, 4], 2),  # two classes have but one pair of classes, and leaving out either leaves none
        ([3, 1, 1, 1], [6, 2, 2, 2], 2),  # all pairs touch the first
        ([0, 0], [0, 0], 1),  # no pair at all
    ],
)
def test_too_few_classes_give_no_interval(hits, totals, ends):
    assert rate_interval(np.array(hits), np.array(totals), ends=ends) is None


class Population:
    """Gaussian classes on a sphere: some are spread wide, and some centres lie where many others do."""

    def __init__(self, dim, differ, lean):
        self.dim, self.differ, self.lean = dim, differ, lean

    def draw(self, rng, classes, samples):
        """(classes, samples, D) unit rows."""
        centres = rng.standard_normal((classes, self.dim)) * np.exp(self.differ * rng.standard_normal((classes, 1)))
        centres[:, 0] += self.lean
        rows = centres[:, None] + 0.45 * rng.standard_normal((classes, samples, self.dim))
        return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@functools.cache
def truth(population, pairs=400_000):
    """Ascending similarities of negatives and of positives, of so many classes that they stand for all."""
    rows = population.draw(np.random.default_rng(99), pairs, 2)
    positives = (rows[:, 0] * rows[:, 1]).sum(-1)
    negatives = np.concatenate([(rows * np.roll(rows, shift, axis=0)).sum(-1).ravel() for shift in range(1, 6)])
    return np.sort(negatives), np.sort(positives)


HUBS = Population(dim=4, differ=0.8, lean=2.0)
"""Classes decide: a few are near to many others."""
APART = Population(dim=8, differ=0.5, lean=1.0)
"""Pairs of classes decide: what is near to one is far from the next."""


def share_from(similarities, edge):
    return 1 - np.searchsorted(similarities, edge) / len(similarities)


def between(rows, edge):
    """Accepted pairs between all classes, above the diagonal, and accepted pairs of each class."""
    classes, samples, dim = rows.shape
    flat = rows.reshape(-1, dim)
    blocks = (flat @ flat.T >= edge).reshape(classes, samples, classes, samples).sum((1, 3))
    return np.triu(blocks, 1), (blocks.diagonal() - samples) // 2


def covered(interval, rate):
    return interval[0] <= rate <= interval[1]


DRAWS = 200
COVER = range(180, 197)  # 90 to 98 %


@pytest.mark.parametrize(
    ("population", "edge", "classes", "methods"),
    [
        (HUBS, 0.95, 60, (True, False)),
        (HUBS, 0.80, 30, (True, False)),
        (APART, 0.80, 40, (True,)),
        (APART, 0.93, 40, (True,)),
    ],
    ids=["hubs, FAR 0.035", "hubs, FAR 0.21", "apart, FAR 0.009", "apart, FAR 0.0003"],
)
def test_intervals_at_a_fixed_threshold_cover_the_truth(population, edge, classes, methods):
    negatives, positives = truth(population)
    far, frr = share_from(negatives, edge), 1 - share_from(positives, edge)
    rng = np.random.default_rng(0)
    sizes = np.full(classes, 4)
    hits = {"frr": 0, **dict.fromkeys(methods, 0)}
    for _ in range(DRAWS):
        table, accepted = between(population.draw(rng, classes, 4), edge)
        hits["frr"] += covered(rate_interval(6 - accepted, np.full(classes, 6)), frr)
        for squares in methods:
            hits[squares] += covered(far_interval(table, sizes, squares), far)
    assert all(count in COVER for count in hits.values()), hits


def test_the_plain_jackknife_is_too_wide_where_pairs_of_classes_decide():
    far = share_from(truth(APART)[0], 0.93)
    rng = np.random.default_rng(0)
    tables = [between(APART.draw(rng, 40, 4), 0.93)[0] for _ in range(DRAWS)]
    plain = [far_interval(table, np.full(40, 4), squares=False) for table in tables]
    assert sum(covered(interval, far) for interval in plain) > max(COVER)


@pytest.mark.parametrize(("population", "target"), [(HUBS, 0.01), (APART, 0.03), (APART, 0.001)])
def test_intervals_cover_the_far_that_a_calibrated_threshold_has_on_all_classes(population, target):
    negatives, _ = truth(population)
    rng, hits, classes = np.random.default_rng(0), 0, 50
    upper = np.triu(np.ones((classes, classes), dtype=bool), 1).repeat(4, 0).repeat(4, 1)
    for _ in range(DRAWS):
        rows = population.draw(rng, classes, 4)
        flat = rows.reshape(-1, rows.shape[-1])
        near = np.sort((flat @ flat.T)[upper])[::-1]
        edge = near[int(target * len(near)) - 1] - 1e-9
        hits += covered(far_interval(between(rows, edge)[0], np.full(classes, 4)), share_from(negatives, edge))
    assert hits in COVER, hits


def test_intervals_over_query_classes_cover_the_truth_of_a_fixed_gallery():
    rng, edge, hits = np.random.default_rng(0), 0.9, 0
    gallery = HUBS.draw(rng, 40, 4).reshape(-1, 4)
    far = (HUBS.draw(rng, 50_000, 1)[:, 0] @ gallery.T >= edge).mean()
    for _ in range(DRAWS):
        accepted = (HUBS.draw(rng, 50, 4) @ gallery.T >= edge).sum((1, 2))
        hits += covered(rate_interval(accepted, np.full(50, 4 * len(gallery))), far)
    assert hits in COVER, hits

"""Drift: none for the calibration's own shapes in any share, and more the farther distances move."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from dml.metrics.distance_histograms import BINS, DistanceHistograms, bins_of
from dml.metrics.drift import DRIFTED, ENOUGH, WATCH, drift, jensen_shannon

PAIRS = 100_000


def distances(draws: np.random.Generator, count: int, share: float, shift: float = 0.0) -> np.ndarray:
    """Distances of positives around 0.5 and of negatives around 1.3, as encoders have them."""
    positives = draws.normal(0.5, 0.18, round(count * share))
    negatives = draws.normal(1.3, 0.12, count - len(positives))
    return np.clip(np.concatenate([positives, negatives]) + shift, 0, 2)


def counted(values: np.ndarray) -> np.ndarray:
    return np.bincount(bins_of(values), minlength=BINS)


def calibration(pairs: int = PAIRS) -> DistanceHistograms:
    draws = np.random.default_rng(0)
    kinds = (counted(distances(draws, pairs, share)) for share in (1.0, 0.0))
    return DistanceHistograms(*(tuple(counts.tolist()) for counts in kinds))


CALIBRATION = calibration()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(share=st.floats(0, 1), count=st.integers(ENOUGH, 20_000), seed=st.integers(0, 2**32 - 1))
def test_another_share_of_positives_alone_is_no_drift(share: float, count: int, seed: int) -> None:
    live = counted(distances(np.random.default_rng(seed), count, share))
    found = drift(live, CALIBRATION)
    assert found is not None
    assert found.level == "stable"
    assert found.divergence < 4 * found.noise
    assert found.share == pytest.approx(round(count * share) / count, abs=0.03)


def test_the_noise_is_what_no_drift_gives_on_average() -> None:
    draws = np.random.default_rng(1)
    for count in (300, 3000):
        found = [drift(counted(distances(draws, count, 0.3)), CALIBRATION) for _ in range(60)]
        mean = np.mean([each.divergence for each in found if each])
        noise = np.mean([each.noise for each in found if each])
        assert 0.4 * noise < mean < 1.2 * noise


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_the_farther_distances_move_the_larger_it_is(share: float) -> None:
    draws = np.random.default_rng(2)
    found = [drift(counted(distances(draws, 5000, share, shift)), CALIBRATION) for shift in (0, 0.1, 0.2, 0.4)]
    divergences = [each.divergence for each in found if each]
    assert divergences == sorted(divergences)
    assert divergences[0] < WATCH
    assert divergences[2] > DRIFTED
    assert found[2] is not None
    assert found[2].level == "drifted"


def test_few_calibration_pairs_are_noise_too() -> None:
    live = counted(distances(np.random.default_rng(3), 5000, 0.5))
    few, many = drift(live, calibration(100)), drift(live, CALIBRATION)
    assert few is not None
    assert many is not None
    assert few.noise > 10 * many.noise
    assert few.level == many.level == "stable"


def test_there_is_no_figure_from_too_few_distances_or_without_pairs() -> None:
    live = counted(distances(np.random.default_rng(4), ENOUGH - 1, 0.5))
    assert drift(live, CALIBRATION) is None
    empty = DistanceHistograms((0,) * BINS, CALIBRATION.negatives)
    assert drift(live * 2, empty) is None


def test_the_divergence_is_scipys() -> None:
    draws = np.random.default_rng(5)
    for _ in range(20):
        p, q = (draws.dirichlet(np.full(20, 0.3)) for _ in range(2))
        p[:3] = 0
        p /= p.sum()
        assert jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q, base=2) ** 2, abs=1e-9)
    apart = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    assert jensen_shannon(*apart) == 1.0
    assert jensen_shannon(apart[0], apart[0]) == 0.0

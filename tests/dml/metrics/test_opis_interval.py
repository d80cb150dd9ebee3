"""The interval of a ratio of OPIS: a loop that leaves out class by class, and how often it covers the truth."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from dml.metrics.opis_interval import opis_ratio
from dml.metrics.threshold import ThresholdCurves, opis, threshold_curves


def curves_of(utility_CT: NDArray[np.float64]) -> ThresholdCurves:
    """Curves whose utility is this: sensitivity and specificity alike."""
    classes, thresholds = utility_CT.shape
    counts_C = np.full(classes, 10)
    return ThresholdCurves(
        thresholds_T=np.linspace(0.5, 1.0, thresholds),
        sensitivity_CT=utility_CT,
        specificity_CT=utility_CT,
        classes_C=np.arange(classes),
        positives_C=counts_C,
        negatives_C=counts_C,
        singletons=0,
        distance="euclidean",
        range_from="far",
        range_bounds=(0.01, 0.1),
    )


def test_it_is_the_jackknife_that_leaves_out_one_class_at_a_time() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 6)
    centres = rng.normal(size=(12, 8))
    before, after = (
        threshold_curves(centres[labels] + spread * rng.normal(size=(72, 8)), labels) for spread in (0.9, 0.6)
    )

    def without(curves: ThresholdCurves, index: int) -> float:
        rest = np.delete(np.arange(12), index)
        names = ("sensitivity_CT", "specificity_CT", "classes_C", "positives_C", "negatives_C")
        return opis(replace(curves, **{name: getattr(curves, name)[rest] for name in names}))

    left_out = np.log([without(after, i) / without(before, i) for i in range(12)])
    error = np.sqrt(11 / 12 * ((left_out - left_out.mean()) ** 2).sum())
    found, interval = opis_ratio(before, after)
    assert found == pytest.approx(opis(after) / opis(before))
    assert interval == pytest.approx(np.exp(stats.t.interval(0.95, 11, loc=np.log(found), scale=error)))


def test_it_covers_the_ratio_of_the_population() -> None:
    """Classes drawn anew 400 times, the two models' utilities of a class correlated."""
    rng = np.random.default_rng(1)

    def drawn(classes: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        shared, own = rng.normal(size=(2, classes, 1))
        return 0.9 + 0.03 * shared + 0.01 * own, 0.92 + 0.02 * shared - 0.01 * own

    truth = (0.02**2 + 0.01**2) / (0.03**2 + 0.01**2)
    covered = 0
    for _ in range(400):
        _, interval = opis_ratio(*map(curves_of, drawn(60)))
        assert interval is not None
        covered += interval[0] <= truth <= interval[1]
    assert 0.90 <= covered / 400 <= 0.98


def test_a_model_does_not_differ_from_itself() -> None:
    curves = curves_of(np.random.default_rng(2).random((8, 5)))
    assert opis_ratio(curves, curves) == (1.0, (1.0, 1.0))


def test_two_classes_or_none_that_differ_have_no_interval() -> None:
    before, after = curves_of(np.array([[0.8], [0.6]])), curves_of(np.array([[0.8], [0.7]]))
    assert opis_ratio(before, after) == (pytest.approx(0.25), None)
    alike, apart = curves_of(np.full((5, 1), 0.8)), curves_of(np.array([[0.8], [0.8], [0.8], [0.8], [0.7]]))
    assert opis_ratio(apart, alike) == (0.0, None)
    assert opis_ratio(apart, apart) == (1.0, None), "without the fifth class there is no OPIS to compare"
    assert opis_ratio(alike, apart) == (np.inf, None)


def test_other_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="same classes; got 3 and 4"):
        opis_ratio(curves_of(np.ones((3, 2))), curves_of(np.ones((4, 2))))

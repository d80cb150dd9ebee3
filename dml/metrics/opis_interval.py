"""How OPIS of two models compares on other classes of the same population."""

import math
from typing import TypeAlias

import numpy as np

from dml.metrics.inputs import Floats
from dml.metrics.threshold import ThresholdCurves, opis, utility

Interval: TypeAlias = tuple[float, float]

_ROUNDING = 1e-15
"""An OPIS below it is 0."""


def opis_ratio(before: ThresholdCurves, after: ThresholdCurves, c: float = 1.0) -> tuple[float, Interval | None]:
    """OPIS of `after` over OPIS of `before`, with its 95 % interval over classes.

    The delete-one-class jackknife of the logarithm: both models lose the same class, so what is peculiar to the class
    cancels as far as the models share it. With theta_i = log(OPIS_after / OPIS_before) without class i,

        variance = (C - 1) / C * sum_i (theta_i - mean)^2

    (Efron and Stein, "The jackknife estimate of variance", Annals of Statistics 9, 1981), and Student's t of C - 1
    degrees of freedom. The thresholds, and the negatives that a class is to the others, stay as they are. The interval
    is about other classes, not about other seeds of the training.

    Args:
        before: curves of the one model.
        after: curves of the other, of the same classes.
        c: weight of the utility.

    Returns:
        The ratio, infinite where `before` has an OPIS of 0, and (low, high); None for fewer than three classes, or
        where a model treats all of them alike, or all but one.

    Raises:
        ValueError: the two are of different classes.
    """
    if not np.array_equal(before.classes_C, after.classes_C):
        raise ValueError(
            f"needs curves of the same classes; got {len(before.classes_C)} and {len(after.classes_C)}, not all alike"
        )
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    old, new, classes = opis(before, c), opis(after, c), len(before.classes_C)
    if old < _ROUNDING:
        return math.inf, None
    old_C, new_C = _leaving_out(utility(before, c)), _leaving_out(utility(after, c))
    if classes < 3 or min(new, old_C.min(), new_C.min()) < _ROUNDING:
        return new / old, None
    half = float(stdtrit(classes - 1, 0.975)) * math.sqrt((classes - 1) * float(np.log(new_C / old_C).var()))
    return new / old, (new / old * math.exp(-half), new / old * math.exp(half))


def _leaving_out(utility_CT: Floats) -> Floats:
    """(C,) OPIS without each class."""
    others = len(utility_CT) - 1
    # Around the mean, so that the squares lose no digits.
    centred_CT = utility_CT - utility_CT.mean(axis=0)
    mean_CT = -centred_CT / others
    squares_CT = (centred_CT**2).sum(axis=0) - centred_CT**2
    found: Floats = (squares_CT / others - mean_CT**2).mean(axis=1)
    return found

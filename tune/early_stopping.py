"""Stopping trials that fall behind: asynchronous successive halving, or the median of the others."""

import math
from typing import Any, Literal, TypeAlias

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from dml.config import TrainConfig

EarlyStop: TypeAlias = Literal["asha", "median", "none"]

ENDED = "ended"
"""Reported true by a trial that trained to its own end: what tells it from one that was stopped."""
SHORTEST = 8
"""Evaluations of a trial below which none is stopped: its score has said too little by then."""


def evaluations(train: TrainConfig) -> int:
    """How often a trial is evaluated, and so can be stopped."""
    return math.ceil(train.epochs / train.eval_every)


def build(name: EarlyStop, train: TrainConfig) -> TrialScheduler:
    """The scheduler of this name, on the best score so far; none stops anything where trials are short.

    asha: at a quarter and at half of the epochs a trial goes on if its score is in the better half of those that were
    there before it (Li et al., A System for Massively Parallel Hyperparameter Tuning, MLSys 2020). median: after a
    quarter it is stopped when its best score lies below the median of the others' mean scores up to there (Golovin et
    al., Google Vizier, KDD 2017). The baseline is never stopped, nor is a trial that has ended by itself.

    Args:
        name: asha, median or none.
        train: how long trials train and how often they are evaluated.
    """
    if name == "none" or evaluations(train) < SHORTEST:
        return FIFOScheduler()
    shared: dict[str, Any] = {"time_attr": "epoch", "metric": "best/score", "mode": "max"}
    first = max(1, train.epochs // 4)
    if name == "asha":
        return _Halving(grace_period=first, max_t=train.epochs, reduction_factor=2, stop_last_trials=False, **shared)
    # With a time slice that ends it would pause trials, which begin anew when they go on.
    slice_: dict[str, Any] = {"min_time_slice": math.inf}  # Ray's types ask for a whole number
    return _Median(grace_period=first, **shared, **slice_)


class _Halving(AsyncHyperBandScheduler):
    """Asynchronous successive halving that spares the baseline and the last epoch."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if result.get(ENDED) or result["epoch"] >= self._max_t:
            return str(TrialScheduler.CONTINUE)
        # The baseline's score is recorded all the same: the others are measured against it.
        decision = super().on_trial_result(tune_controller, trial, result)
        return str(TrialScheduler.CONTINUE if _baseline(trial) else decision)


class _Median(MedianStoppingRule):
    """The median rule that spares the baseline and trials that have ended."""

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if result.get(ENDED):
            return str(TrialScheduler.CONTINUE)
        if _baseline(trial):
            self._results[trial].append(result)
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        # One that failed may have reported no epoch.
        if self._time_attr in result:
            super().on_trial_complete(tune_controller, trial, result)


def _baseline(trial: Trial) -> bool:
    return bool(trial.config.get("number") == 0)

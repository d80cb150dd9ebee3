"""Which trials are stopped, judged by Ray Tune's own schedulers."""

from dataclasses import dataclass
from typing import Any

import pytest
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from dml.config import TrainConfig
from tune.early_stopping import ENDED, EarlyStop, build, evaluations

LONG = TrainConfig(epochs=16)


@dataclass(eq=False)
class Runner:
    """As much of a Tune trial as a scheduler looks at."""

    trial_id: str
    config: dict[str, int]


class Race:
    """Trials that report a score at every epoch, each epoch of all of them in turn."""

    def __init__(self, name: EarlyStop, train: TrainConfig = LONG) -> None:
        self.scheduler: Any = build(name, train)
        self.train = train

    def run(self, scores: dict[int, float]) -> dict[int, int]:
        """The epoch at which each trial was stopped, by number; those that were not are left out."""
        trials: dict[int, Any] = {n: Runner(str(n), {"number": n}) for n in scores}
        stopped: dict[int, int] = {}
        for trial in trials.values():
            self.scheduler.on_trial_add(None, trial)
        for epoch in range(1, self.train.epochs + 1):
            for number, trial in trials.items():
                if number not in stopped and not self._goes_on(trial, epoch, scores[number]):
                    stopped[number] = epoch
        for number, trial in trials.items():
            if number not in stopped:
                assert self._goes_on(trial, self.train.epochs, scores[number], ended=True)
        return stopped

    def _goes_on(self, trial: Any, epoch: int, score: float, ended: bool = False) -> bool:
        result = {"epoch": epoch, "best/score": score * epoch, "training_iteration": epoch, ENDED: ended}
        decision = self.scheduler.on_trial_result(None, trial, result)
        assert decision in (TrialScheduler.CONTINUE, TrialScheduler.STOP), "a paused trial would begin anew"
        if decision == TrialScheduler.STOP:
            self.scheduler.on_trial_complete(None, trial, result)
        return bool(decision == TrialScheduler.CONTINUE)


def test_halving_stops_the_worse_half_at_a_quarter_and_at_half_of_the_epochs() -> None:
    falling = {number: 1 - 0.1 * number for number in range(1, 7)}
    stopped = Race("asha").run(falling)
    assert 1 not in stopped, "the best trains to its end"
    assert {*stopped.values()} <= {4, 8}
    assert stopped[6] == 4


def test_the_median_rule_stops_what_stays_below_the_others() -> None:
    stopped = Race("median").run({1: 1.0, 2: 0.9, 3: 0.8, 4: 0.7, 5: 0.1})
    assert stopped[5] == 4
    assert 1 not in stopped


@pytest.mark.parametrize("name", ["asha", "median"])
def test_the_baseline_is_never_stopped_but_the_others_are_measured_against_it(name: EarlyStop) -> None:
    assert 0 not in Race(name).run({1: 1.0, 2: 0.9, 3: 0.8, 4: 0.7, 0: 0.1})
    assert 1 in Race("asha").run({0: 1.0, 1: 0.5})


@pytest.mark.parametrize("name", ["asha", "median", "none"])
def test_short_trials_are_not_stopped(name: EarlyStop) -> None:
    for train in (TrainConfig(epochs=7), TrainConfig(epochs=48, eval_every=8)):
        assert evaluations(train) < 8
        assert type(build(name, train)) is FIFOScheduler
        assert Race(name, train).run({1: 1.0, 2: 0.9, 3: 0.1}) == {}


def test_nothing_is_stopped_by_none() -> None:
    assert Race("none").run({1: 1.0, 2: 0.9, 3: 0.1}) == {}

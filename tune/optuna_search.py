"""Optuna behind Ray Tune: Ray's OptunaSearch with what it leaves out."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from tune import storage
from tune.early_stopping import ENDED
from tune.objective import Objective, Outcome, violation
from tune.space import Point, Space, settings

ATTRIBUTES = {"recall@1": "best/recall@1", "opis": "best/opis", "score": "best/score"}
"""User attributes of a trial in Optuna, and the metrics that they are."""
SETTINGS, REPORT, ERROR = "settings", "report", "error"
"""Further ones: what was varied, the last report, and why it failed."""
_STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}


class StudySearch(OptunaSearch):
    """Asks Optuna for trials and tells it how they ended; Optuna's storage is all that a search goes on from.

    What it mends of Ray's: a trial that was stopped early is PRUNED and one without finite figures FAIL (there both end
    as COMPLETE or stay RUNNING); each carries its settings, its figures and its error as user attributes and how far
    its Recall@1 lies below the tolerated as a constraint, which the samplers heed; points are enqueued once, also when
    the study is there already; margins designed from the baseline are enqueued when it has ended; trials that an
    interruption left RUNNING are suggested again before new ones; and what Tune saves and pickles neither holds the
    database's URL nor grows with the study.

    Args:
        space: what is searched.
        objective: what is told, and the tolerance.
        sampler: one of `tune.sampler`.
        points: to try first, in this order.
        trials: that the search will run; no point is enqueued beyond them.
        design: whether margins designed from the baseline are tried too.
        study: Optuna's name of the study.
        url: of `tune.storage.url`.
        hopeless: no further trial is suggested once the first so many to end have all failed; 0 for never.
    """

    _ot_study: Any  # Ray's types have it None

    def __init__(
        self,
        space: Space,
        objective: Objective,
        *,
        sampler: BaseSampler,
        points: Sequence[Point],
        trials: int,
        design: bool,
        study: str,
        url: str,
        hopeless: int = 0,
    ) -> None:
        self._searched, self._objective = space, objective
        self._trials, self._design, self._hopeless = trials, design, hopeless
        self._settings: dict[str, Point] = {}
        self._reference = -math.inf
        self._reference_is_baseline = False
        names, modes = list(objective.metrics), [str(mode) for mode in objective.metrics.values()]
        several = len(names) > 1
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        super().__init__(
            space.suggest,
            metric=names if several else names[0],
            mode=modes if several else modes[0],
            sampler=sampler,
            study_name=study,
            storage=storage.connect(url),
        )
        for point in points[:trials]:
            self._ot_study.enqueue_trial(point, skip_if_exists=True)

        self._take_up()

    def _take_up(self) -> None:
        """Where the study stands: nowhere, or as an interruption left it."""
        trials = [trial for trial in self._ot_study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]
        self._asked = len(trials)
        self._failed = sum(trial.state == TrialState.FAIL for trial in trials)
        self._succeeded = any(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials)
        self._lost = [
            optuna.Trial(self._ot_study, trial._trial_id) for trial in trials if trial.state == TrialState.RUNNING
        ]
        for trial in trials:
            if trial.state == TrialState.COMPLETE:
                self._refer(trial.number, trial.user_attrs["recall@1"])
        if trials and trials[0].state == TrialState.COMPLETE:
            self._enqueue_designed(trials[0].user_attrs[REPORT])

    @property
    def begun(self) -> int:
        """Trials that were asked for so far, those included that an earlier process asked for."""
        return self._asked

    @property
    def left(self) -> int:
        """Trials to run: those that are lost, and those that were not yet asked for."""
        return len(self._lost) + max(0, self._trials - self._asked)

    @property
    def given_up(self) -> bool:
        """Whether the first trials have all failed, so that no further one is suggested."""
        return 0 < self._hopeless <= self._failed and not self._succeeded

    def suggest(self, trial_id: str) -> Any:
        """The parameters of the next trial."""
        if trial_id not in self._ot_trials:
            if self.given_up:
                return None if self._ot_trials else Searcher.FINISHED  # those that still run may show otherwise
            if self._lost:
                self._ot_trials[trial_id] = self._lost.pop(0)
            else:
                self._asked += 1
        with warnings.catch_warnings():
            # Ray takes a sampler that fits a model, as the Gaussian process does, for a space that trains one.
            warnings.filterwarnings("ignore", message="Define-by-run function passed")
            found: Point | None = super().suggest(trial_id)
        if found is not None:
            self._settings[trial_id] = settings(found)
        return found

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Notes an epoch's figure; several objectives at once have no such record in Optuna."""
        if trial_id in self._ot_trials and not result.get(ENDED):
            self._report(self._ot_trials[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tells Optuna how a trial ended: COMPLETE, PRUNED or FAIL; an error's cause Tune gives to `failed` only."""
        if error or trial_id not in self._ot_trials:
            return
        result = result or {}
        lost = [name for name in (*self._objective.metrics, *ATTRIBUTES.values()) if not _finite(result.get(name))]
        if result.get(ERROR) or lost:
            self.failed(trial_id, result.get(ERROR) or f"{lost[0]} is {result.get(lost[0], 'not reported')}")
            return
        trial = self._ot_trials.pop(trial_id)
        self._succeeded = True
        self._note(trial, trial_id, result)
        for name, metric in ATTRIBUTES.items():
            trial.set_user_attr(name, result[metric])
        if not result.get(ENDED):
            # Tune does not pass on the report that a trial is stopped at.
            self._report(trial, result)
            self._ot_study.tell(trial, state=TrialState.PRUNED)
            return
        self._refer(trial.number, result["best/recall@1"])
        # Until the baseline has ended, the best Recall@1 so far stands in for its own.
        bound = violation(result["best/recall@1"], self._reference, self._objective.tolerance)
        trial.set_constraint("recall@1", bound)
        self._ot_study.tell(trial, [result[name] for name in self._objective.metrics], state=TrialState.COMPLETE)
        if trial.number == 0:
            self._enqueue_designed(result)

    def failed(self, trial_id: str, cause: str) -> None:
        """Tells Optuna that a trial failed, and why; does nothing when it was told how the trial ended."""
        trial = self._ot_trials.pop(trial_id, None)
        if trial is None:
            return
        self._failed += 1
        self._note(trial, trial_id, {})
        trial.set_user_attr(ERROR, cause)
        self._ot_study.tell(trial, state=TrialState.FAIL)

    def outcomes(self) -> list[Outcome]:
        """How the trials stand that were asked for, by number."""
        trials = self._ot_study.get_trials(deepcopy=False)
        return [outcome(trial) for trial in trials if trial.state != TrialState.WAITING]

    def _note(self, trial: optuna.Trial, trial_id: str, result: Mapping[str, Any]) -> None:
        trial.set_user_attr(SETTINGS, self._settings.pop(trial_id))
        if result:
            kept = {name: value for name, value in result.items() if _number(value) and not name.startswith("config/")}
            texts = {name: result.get(name, "") for name in ("run_id", "checkpoint_path")}
            trial.set_user_attr(REPORT, kept | texts)

    def _refer(self, number: int, recall: float) -> None:
        if number == 0:
            self._reference, self._reference_is_baseline = recall, True
        elif not self._reference_is_baseline:
            self._reference = max(self._reference, recall)

    def _enqueue_designed(self, baseline: Mapping[str, float]) -> None:
        point = self._searched.designed(baseline) if self._design and self._asked < self._trials else None
        if point is not None:
            self._ot_study.enqueue_trial(point, skip_if_exists=True)

    def _report(self, trial: optuna.Trial, result: dict[str, Any]) -> None:
        names = list(self._objective.metrics)
        if len(names) == 1 and math.isfinite(result.get(names[0], math.nan)):
            with warnings.catch_warnings():
                # A trial that goes on after an interruption may repeat epochs; their first figures stand.
                warnings.filterwarnings("ignore", message="The reported value is ignored")
                trial.report(result[names[0]], int(result["epoch"]))

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles it: the URL of a database may hold a password, and the study's cache grows with it."""
        left_out = ("_ot_study", "_storage", "_ot_trials", "_lost")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def save(self, checkpoint_path: str) -> None:
        """Tune asks for a file; there is nothing to keep beside Optuna's storage."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Not done: a search goes on by a new StudySearch of the same study."""
        raise NotImplementedError("a search goes on from Optuna's storage, not from what Tune saved")


def outcome(trial: FrozenTrial) -> Outcome:
    """A trial as `StudySearch` left it in Optuna's storage."""
    told = trial.user_attrs
    report: dict[str, Any] = told.get(REPORT, {})
    return Outcome(
        number=trial.number,
        state=_STATES.get(trial.state, "unfinished"),
        settings=told.get(SETTINGS, {}),
        metrics={name: value for name, value in report.items() if _number(value)},
        checkpoint=report.get("checkpoint_path", ""),
        run_id=report.get("run_id", ""),
        seconds=max(report.get("time_total_s", 0.0), report.get("loop_seconds", 0.0)),
        error=told.get(ERROR, ""),
    )


def _number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def _finite(value: object) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)

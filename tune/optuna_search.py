"""Optuna behind Ray Tune: Ray's OptunaSearch with what it leaves out."""

import math
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

from tune import storage
from tune.early_stopping import ENDED
from tune.objective import Objective, violation
from tune.space import Point, Space

ATTRIBUTES = {"recall@1": "best/recall@1", "opis": "best/opis", "score": "best/score"}
"""User attributes of a trial in Optuna, and the metrics that they are."""


class StudySearch(OptunaSearch):
    """Asks Optuna for trials and tells it how they ended.

    What it mends of Ray's: a trial that was stopped early is PRUNED and one without finite figures FAIL (there both end
    as COMPLETE or stay RUNNING); each carries its Recall@1, OPIS and score as user attributes and how far its Recall@1
    lies below the tolerated as a constraint, which the samplers heed; points are enqueued once, also when the study is
    there already; margins designed from the baseline are enqueued when it has ended; and neither the state that Tune
    saves nor its pickle holds the database's URL or grows with the study.

    Args:
        space: what is searched.
        objective: what is told, and the tolerance.
        sampler: one of `tune.sampler`.
        points: to try first, in this order.
        trials: that the search will run; no point is enqueued beyond them.
        design: whether margins designed from the baseline are tried too.
        study: Optuna's name of the study.
        url: of `tune.storage.url`.
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
    ) -> None:
        self._searched, self._objective = space, objective
        self._trials, self._design = trials, design
        self._asked = 0
        self._lost: list[optuna.Trial] = []
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

    def connect(self, url: str) -> Self:
        """Opens the study again after this was unpickled."""
        self._storage = storage.connect(url)
        self._setup_study(cast(Any, self._mode))
        return self

    def suggest(self, trial_id: str) -> Point | None:
        """The parameters of the next trial."""
        if trial_id not in self._ot_trials:
            self._asked += 1
            if self._lost:
                self._ot_trials[trial_id] = self._lost.pop(0)
        with warnings.catch_warnings():
            # Ray takes a sampler that fits a model, as the Gaussian process does, for a space that trains one.
            warnings.filterwarnings("ignore", message="Define-by-run function passed")
            found: Point | None = super().suggest(trial_id)
        return found

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Notes an epoch's figure; several objectives at once have no such record in Optuna."""
        if trial_id in self._ot_trials and not result.get(ENDED):
            self._report(self._ot_trials[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tells Optuna how a trial ended: COMPLETE, PRUNED or FAIL."""
        trial = self._ot_trials.pop(trial_id, None)
        if trial is None:
            return
        values = [float((result or {}).get(name, math.nan)) for name in self._objective.metrics]
        if error or result is None or not all(map(math.isfinite, values)):
            self._ot_study.tell(trial, state=TrialState.FAIL)
            return
        for name, metric in ATTRIBUTES.items():
            trial.set_user_attr(name, result[metric])
        if not result.get(ENDED):
            # Tune does not pass on the report that a trial is stopped at.
            self._report(trial, result)
            self._ot_study.tell(trial, state=TrialState.PRUNED)
            return
        self._judge(trial, result["best/recall@1"])
        self._ot_study.tell(trial, values, state=TrialState.COMPLETE)
        if trial.number == 0 and self._design and self._asked < self._trials:
            point = self._searched.designed(result)
            if point is not None:
                self._ot_study.enqueue_trial(point, skip_if_exists=True)

    def _judge(self, trial: optuna.Trial, recall: float) -> None:
        """Sets the constraint; until the baseline has ended, the best Recall@1 so far stands in for its own."""
        if trial.number == 0:
            self._reference, self._reference_is_baseline = recall, True
        elif not self._reference_is_baseline:
            self._reference = max(self._reference, recall)
        trial.set_constraint("recall@1", violation(recall, self._reference, self._objective.tolerance))

    def _report(self, trial: optuna.Trial, result: dict[str, Any]) -> None:
        names = list(self._objective.metrics)
        if len(names) == 1 and math.isfinite(result.get(names[0], math.nan)):
            with warnings.catch_warnings():
                # A trial that goes on after an interruption may repeat epochs; their first figures stand.
                warnings.filterwarnings("ignore", message="The reported value is ignored")
                trial.report(result[names[0]], int(result["epoch"]))

    def __getstate__(self) -> dict[str, Any]:
        """What Tune keeps: the URL of a database may hold a password, and the study's cache grows with it."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_ot_study", "_storage")}

    def save(self, checkpoint_path: str) -> None:
        """Writes the sampler and the running trials; the rest is in Optuna's storage."""
        with Path(checkpoint_path).open("wb") as file:
            _Pickler(file).dump(self.__getstate__())

    def restore(self, checkpoint_path: str) -> None:
        """Reads what `save` wrote, and puts it right where the study has gone further; it must be connected.

        Trials that have ended since are not told again, and those that were asked for since, which Tune knows nothing
        of, are what is suggested next.
        """
        with Path(checkpoint_path).open("rb") as file:
            self.__dict__.update(_Unpickler(file, self._ot_study).load())
        self._ot_study.sampler = self._sampler
        running = {trial._trial_id for trial in self._ot_study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))}
        self._ot_trials = {name: trial for name, trial in self._ot_trials.items() if trial._trial_id in running}
        known = {trial._trial_id for trial in self._ot_trials.values()}
        self._lost = [optuna.Trial(self._ot_study, trial_id) for trial_id in sorted(running - known)]


class _Pickler(pickle.Pickler):
    """Leaves out the study and its storage, which running trials refer to."""

    def persistent_id(self, obj: Any) -> str | None:
        if isinstance(obj, optuna.Study):
            return "study"
        return "storage" if isinstance(obj, BaseStorage) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, study: optuna.Study) -> None:
        super().__init__(file)
        self._study = study

    def persistent_load(self, pid: str) -> Any:
        return self._study if pid == "study" else self._study._storage

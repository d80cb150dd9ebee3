"""Runs the trials of a search with Ray Tune, and reads how they ended.

Tune's own records are thrown away: it writes them now and then, so that one that is gone on from would run anew what
had ended since. A search goes on from Optuna's storage and from what the trials themselves keep.
"""

import logging
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray.tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from tune.early_stopping import ENDED
from tune.objective import Outcome
from tune.optuna_search import ATTRIBUTES, ERROR, StudySearch
from tune.space import Point, settings

RETRIES = 3
"""How often a trial is begun again, or goes on from what it keeps, whose process or node was lost."""


@dataclass(frozen=True)
class Bench:
    """Where trials run.

    Attributes:
        storage: absolute path or URI of a folder; Tune makes one of its own in it.
        trainable: called with the parameters of a trial, in a process of its own; reports `epoch` and the metrics of
            `tune.objective`, and at its end `tune.early_stopping.ENDED`. One that fails reports its error at its end
            (`tune.optuna_search.ERROR`): one that raises, or dies, is begun again.
        request: Ray's resource request of a trial.
        at_once: trials side by side.
        reuse: whether a process runs one trial after another.
        callbacks: Tune's.
    """

    storage: str
    trainable: Callable[[Point], None]
    request: Mapping[str, float]
    at_once: int
    reuse: bool = True
    callbacks: Sequence[ray.tune.Callback] = ()

    def search(self, searcher: StudySearch, scheduler: TrialScheduler) -> list[Outcome]:
        """Runs the trials of a searcher that have not ended; returns how all stand, earlier ones too, by number."""
        if searcher.left and not searcher.given_up:
            self._fit(searcher, scheduler, searcher.left, [_Causes(searcher)])
        return searcher.outcomes()

    def run(self, points: Sequence[Point]) -> list[Outcome]:
        """Runs these very trials."""
        results = self._fit(_These(points), None, len(points), [])
        return [_outcome(results[index]) for index in range(len(results))]

    def _fit(
        self, searcher: Any, scheduler: TrialScheduler | None, trials: int, callbacks: Sequence[ray.tune.Callback]
    ) -> ray.tune.ResultGrid:
        _set_up_tune()
        tuner = ray.tune.Tuner(
            ray.tune.with_resources(cast(Any, self.trainable), dict(self.request)),
            tune_config=ray.tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=trials,
                max_concurrent_trials=self.at_once,
                reuse_actors=self.reuse,
            ),
            run_config=ray.tune.RunConfig(
                name=f"tune-{uuid.uuid4().hex[:8]}",
                storage_path=self.storage,
                verbose=0,
                failure_config=ray.tune.FailureConfig(max_failures=RETRIES),
                # Optuna knows why a trial failed before the others are told.
                callbacks=[*callbacks, *self.callbacks],
            ),
        )
        return tuner.fit()


class _Causes(ray.tune.Callback):
    """Tells the searcher why a trial failed, which Tune does not."""

    def __init__(self, searcher: StudySearch) -> None:
        self._searcher = searcher

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._searcher.failed(trial.trial_id, reason(trial))


class _These(Searcher):
    """Suggests given points, one after another."""

    def __init__(self, points: Sequence[Point]) -> None:
        super().__init__()
        self._points, self._next = list(points), 0

    def suggest(self, trial_id: str) -> Any:
        if self._next == len(self._points):
            return Searcher.FINISHED
        self._next += 1
        return dict(self._points[self._next - 1])

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("finals are begun again; those that have ended say so at once")


def reason(trial: Trial) -> str:
    """Why a trial failed: what it reported, or the last line of the error by which it was lost."""
    if told := trial.last_result.get(ERROR):
        return str(told)
    # Trial.get_error looks in the storage, where Tune copies this file only later.
    written = Path(trial.local_path or "") / "error.txt"
    return _last_line(written.read_text()) if written.is_file() else "unknown"


def _last_line(text: str) -> str:
    """The last line of a traceback that says anything."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "unknown")


def _outcome(result: ray.tune.Result) -> Outcome:
    metrics, params = result.metrics or {}, result.config or {}
    error = _last_line(str(result.error)) if result.error else str(metrics.get(ERROR, ""))
    lost = [name for name in ATTRIBUTES.values() if not math.isfinite(metrics.get(name, 0.0))]
    if lost and not error:
        error = f"{lost[0]} is {metrics[lost[0]]}"
    if error:
        state = "failed"
    elif not metrics.get("done"):
        state = "unfinished"
    else:
        state = "finished" if metrics.get(ENDED) else "pruned"
    return Outcome(
        number=int(params["number"]),
        state=state,
        settings=settings(params),
        metrics={name: value for name, value in metrics.items() if isinstance(value, float | int)},
        checkpoint=metrics.get("checkpoint_path", ""),
        run_id=metrics.get("run_id", ""),
        seconds=metrics.get("time_total_s", 0.0),
        error=error,
    )


def _set_up_tune() -> None:
    # Of trials that fail before their first report; the searcher looks for its metrics itself.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    # What Tune writes of itself is not read again.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")
    # Tune's own loggers would write every result three more times, and its display stand between the lines of ours.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    logging.getLogger("ray.train").setLevel(logging.ERROR)

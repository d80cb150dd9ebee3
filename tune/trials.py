"""Runs the trials of a search with Ray Tune, and reads how they ended."""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray.tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from tune.early_stopping import ENDED
from tune.objective import Outcome
from tune.optuna_search import ATTRIBUTES, StudySearch
from tune.space import Point, settings


@dataclass(frozen=True)
class Bench:
    """Where trials run.

    Attributes:
        name: of the search's folder under storage.
        storage: absolute path or URI.
        trainable: called with the parameters of a trial, in a process of its own; reports `epoch` and the metrics of
            `tune.objective`, and at its end `tune.early_stopping.ENDED`.
        request: Ray's resource request of a trial.
        at_once: trials side by side.
        reuse: whether a process runs one trial after another.
        callbacks: Tune's.
    """

    name: str
    storage: str
    trainable: Callable[[Point], None]
    request: Mapping[str, float]
    at_once: int
    reuse: bool = True
    callbacks: Sequence[ray.tune.Callback] = ()

    def search(self, searcher: StudySearch, scheduler: TrialScheduler, trials: int) -> list[Outcome]:
        """Runs so many trials of a searcher."""
        return self._fit(searcher, scheduler, trials)

    def resume(self, url: str) -> list[Outcome]:
        """Goes on with the trials of `search` that had not ended.

        Args:
            url: of the study's database, which the saved state leaves out.
        """
        _set_up_tune()
        tuner = ray.tune.Tuner.restore(f"{self.storage}/{self.name}", self._trainable(), resume_unfinished=True)
        # Tune gives no way to hand a restored search its connection.
        searcher = cast(Any, tuner)._local_tuner._tune_config.search_alg
        cast(StudySearch, searcher).connect(url)
        return _outcomes(tuner)

    def run(self, points: Sequence[Point]) -> list[Outcome]:
        """Runs these very trials, or goes on with them when they were begun."""
        where = f"{self.storage}/{self.name}"
        if ray.tune.Tuner.can_restore(where):
            _set_up_tune()
            return _outcomes(ray.tune.Tuner.restore(where, self._trainable(), resume_unfinished=True))
        return self._fit(_These(points), None, len(points))

    def _fit(self, searcher: Any, scheduler: TrialScheduler | None, trials: int) -> list[Outcome]:
        _set_up_tune()
        tuner = ray.tune.Tuner(
            self._trainable(),
            tune_config=ray.tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=trials,
                max_concurrent_trials=self.at_once,
                reuse_actors=self.reuse,
            ),
            run_config=ray.tune.RunConfig(
                name=self.name,
                storage_path=self.storage,
                verbose=0,
                checkpoint_config=ray.tune.CheckpointConfig(num_to_keep=1),
                callbacks=[*self.callbacks],
            ),
        )
        return _outcomes(tuner)

    def _trainable(self) -> Any:
        return ray.tune.with_resources(cast(Any, self.trainable), dict(self.request))


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
        Path(checkpoint_path).write_text(str(self._next))

    def restore(self, checkpoint_path: str) -> None:
        self._next = int(Path(checkpoint_path).read_text())


def _outcomes(tuner: ray.tune.Tuner) -> list[Outcome]:
    results = tuner.fit()
    return [_outcome(results[index]) for index in range(len(results))]


def _outcome(result: ray.tune.Result) -> Outcome:
    from tune.progress import last_line

    metrics, params = result.metrics or {}, result.config or {}
    error = last_line(str(result.error)) if result.error else ""
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
        checkpoint=metrics.get("checkpoint_path") or (result.checkpoint.path if result.checkpoint else ""),
        run_id=metrics.get("run_id", ""),
        seconds=metrics.get("time_total_s", 0.0),
        error=error,
    )


def _set_up_tune() -> None:
    # Tune's own loggers would write every result three more times, and its display stand between the lines of ours.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    logging.getLogger("ray.train").setLevel(logging.ERROR)

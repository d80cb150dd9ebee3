"""What a person sees while a search runs: a live table in a terminal, plain lines in a job's log."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional

import ray.tune
import rich.console
import rich.live
import rich.table
from ray.tune.experiment import Trial

from tune.early_stopping import ENDED
from tune.optuna_search import ERROR
from tune.ranges import Value
from tune.space import settings
from tune.trials import reason


@dataclass
class _Row:
    label: str
    settings: str
    epochs: int
    began: float
    state: str = "running"
    epoch: int = 0
    loss: float = float("nan")
    best: float = float("nan")
    recall: float = float("nan")
    opis: float = float("nan")
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        return self.state not in ("running", "lost")


@dataclass
class Overhead:
    """Seconds of a trial outside the training loop.

    Attributes:
        first: of trials that were the first of their process: imports, data, connections.
        later: of all others.
    """

    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)


class Progress(ray.tune.Callback):
    """Follows the trials of a search.

    Args:
        trials: how many the search will run.
        done: how many of them an earlier process has run.
        epochs: epochs of a trial.

    Attributes:
        latest: that of the search in this process.
    """

    latest: ClassVar[Optional["Progress"]] = None

    def __init__(self, trials: int, epochs: int, done: int = 0) -> None:
        self.trials, self.epochs, self.before = trials, epochs, done
        self.overhead = Overhead()
        self.seconds: dict[str, float] = {}
        self._rows: dict[str, _Row] = {}
        self._live: rich.live.Live | None = None

    def setup(self, stop: Any = None, num_samples: Any = None, total_num_samples: Any = None, **info: Any) -> None:
        """Starts the live table when stdout is a terminal."""
        Progress.latest = self
        if sys.stdout.isatty():
            self._live = rich.live.Live(self._table(), console=rich.console.Console(), refresh_per_second=4)
            self._live.start()

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Notes when a trial began."""
        row = _Row(_label(trial.config), _settings(trial.config), self.epochs, time.perf_counter())
        self._rows[trial.trial_id] = row
        self._say(row, "started")

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Shows an epoch's figures."""
        row = self._rows[trial.trial_id]
        if result.get(ERROR) or (result.get(ENDED) and row.epoch):
            return  # it says no more than an earlier report, or what is said at the trial's end
        row.epoch, row.loss, row.best = int(result["epoch"]), result["train/loss"], result["best/score"]
        row.recall, row.opis = result["best/recall@1"], result["best/opis"]
        if result.get("resumed"):
            self._say(row, f"goes on after epoch {row.epoch}/{row.epochs}")
            return
        self._say(row, f"epoch {row.epoch}/{row.epochs}  loss {row.loss:.4f}  val score {result['val/score']:.4f}")

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Says that a trial was lost, which goes on."""
        row = self._rows[trial.trial_id]
        row.state = "lost"
        # Ray goes on about what may have killed it.
        self._say(row, f"lost, and goes on from its newest checkpoint: {reason(trial).partition('. ')[0]}")

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Notes the trial's wall time and, unless it was stopped early, what of it was not training."""
        result = trial.last_result
        if result.get(ERROR):
            self.on_trial_error(iteration, trials, trial)
            return
        if not result.get(ENDED):
            row = self._end(trial, "pruned")
            self._say(row, f"stopped early after epoch {row.epoch}: score {row.best:.4f}")
            return
        row = self._end(trial, "finished")
        if not result.get("resumed"):
            kind = self.overhead.later if result.get("trials_before_in_process") else self.overhead.first
            kind.append(row.seconds - result["loop_seconds"])
        self._say(
            row,
            f"finished in {row.seconds:.0f} s  score {row.best:.4f}  Recall@1 {row.recall:.4f}  OPIS {row.opis:.5f}",
        )

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Says in one line why a trial failed."""
        row = self._end(trial, "failed")
        self._say(row, f"failed: {reason(trial)}")

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        """Leaves the last table standing."""
        if self._live is not None:
            self._live.update(self._table())
            self._live.stop()
            self._live = None

    def __getstate__(self) -> dict[str, Any]:
        """Tune saves its callbacks; a terminal cannot be saved."""
        return {**self.__dict__, "_live": None}

    def _end(self, trial: Trial, state: str) -> _Row:
        row = self._rows[trial.trial_id]
        row.state, row.seconds = state, time.perf_counter() - row.began
        self.seconds[trial.trial_id] = row.seconds
        return row

    def _say(self, row: _Row, text: str) -> None:
        if self._live is not None:
            self._live.update(self._table())
        else:
            done = sum(other.done for other in self._rows.values())
            print(f"[{self.before + done}/{self.trials}] trial {row.label}: {text}", flush=True)

    def _table(self) -> rich.table.Table:
        done = [row for row in self._rows.values() if row.done]
        best = max((row.best for row in self._rows.values() if row.best == row.best), default=float("nan"))
        table = rich.table.Table(title=f"{self.before + len(done)} of {self.trials} trials done, best score {best:.4f}")
        for name in ("trial", "settings"):
            table.add_column(name)
        for name in ("epoch", "loss", "Recall@1", "OPIS", "score", "state"):
            table.add_column(name, justify="right")
        for row in self._rows.values():
            figures = (
                [f"{row.loss:.4f}", f"{row.recall:.4f}", f"{row.opis:.5f}", f"{row.best:.4f}"]
                if row.epoch
                else [""] * 4
            )
            table.add_row(row.label, row.settings, f"{row.epoch}/{row.epochs}", *figures, row.state)
        return table


def _settings(params: Mapping[str, Value]) -> str:
    """What a trial varies, in a few words."""
    varied = settings(params)
    off = varied.get("tcm.weight") == 0
    shown = [
        f"{name.removeprefix('tcm.')}={f'{value:.3g}' if isinstance(value, float) else value}"
        for name, value in varied.items()
        if name != "train.seed" and not (off and name.startswith("tcm."))
    ]
    baseline = ["baseline without TCM" if params["number"] == 0 else "without TCM"] if off else []
    return "  ".join([*baseline, *shown])


def _label(params: Mapping[str, Value]) -> str:
    """What a trial is called: its number, and the seed where it is a finalist's."""
    seed = params.get("train.seed")
    return f"{params['number']}" if seed is None else f"{params['number']}, seed {seed}"

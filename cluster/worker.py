"""What every worker does: dml.loop, with its reports passed on to Ray and MLflow.

A trial with one worker calls `work` in its own process; with more, Ray Train calls it in each of theirs.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeAlias

import torch

from cluster import environment, system_metrics
from cluster.tracking import Run, Store
from cluster.writer import Writer
from dml import checkpoint, gather, loop
from dml.config import Config
from dml.data import datasets

SERVER_AWAY = 300.0
"""Seconds that a trial among many waits at its start for an MLflow server that is away, before it fails."""
Seen: TypeAlias = Callable[[loop.StepReport | loop.EpochReport], None]
BEST = ("recall@1", "opis", "sqrt_opis", "opis_noise_floor", "mean_utility", "score")


@dataclass(frozen=True)
class Job:
    """One training, as it travels to the workers.

    Attributes:
        config: the resolved settings.
        name: shown in MLflow.
        store: the MLflow store.
        parent: MLflow run id of the search; None for a training on its own.
        key: names the run once and for all.
        tags: tags of the MLflow run.
        run: the MLflow run, once it is started (see `tracked`).
    """

    config: Config
    name: str
    store: Store
    parent: str | None = None
    key: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    run: Run | None = None


class TrainingError(RuntimeError):
    """A worker failed; one line with its rank and its error."""


class Report(Protocol):
    """Takes an epoch's metrics, with the checkpoint folder of a new best epoch (None otherwise), on every rank."""

    def __call__(self, metrics: dict[str, float | str], folder: Path | None) -> None: ...  # noqa: D102


@contextmanager
def tracked(job: Job, *, patience: float = SERVER_AWAY) -> Iterator[Job]:
    """Starts the job's MLflow run, or goes on with it, where the training is begun; ends it as the block does.

    Workers then need no server to begin with, nor to begin again. They write the run while the block waits for them.

    Args:
        job: not started yet.
        patience: seconds to wait for a tracking server that is away.

    Raises:
        TrackingError: the server does not answer, or refuses.
    """
    run = job.store.start(
        job.name, params=job.config.flat, tags=job.tags, parent=job.parent, key=job.key, patience=patience
    )
    with run.ending():
        yield replace(job, run=run)


def work(job: Job, report: Report, *, device: torch.device, seen: Seen = lambda event: None) -> dict[str, float | str]:
    """Trains; reports after each evaluated epoch; returns the last report.

    The reported metrics hold the epoch's own figures (val/..., train/...) and, under best/..., those of the best epoch
    so far by score, whose checkpoint is the one that is kept; loop_seconds is the time spent training and evaluating.

    Args:
        job: `tracked`.
        report: called on every rank.
        device: where this rank computes.
        seen: called on the first rank with everything that the loop says, as it says it.
    """
    assert job.run is not None
    splits = datasets.load(job.config.data)
    if gather.rank(gather.default_group()) != 0:
        return _train(job, splits, report, device=device)
    with job.run.writing() as record, system_metrics.sampling(record, job.run.began, device):
        record.tags({"data.fingerprint": splits.fingerprint, **environment.describe()})
        listener = _Listener(record, seen)
        return _train(job, splits, report, device=device, listener=listener)


class _Listener:
    """Passes what the loop says on to MLflow and to whoever watches."""

    def __init__(self, record: Writer, seen: Seen) -> None:
        self._record, self._seen = record, seen
        self._steps: frozenset[str] = frozenset()

    def __call__(self, event: loop.StepReport | loop.EpochReport, best: dict[str, float]) -> None:
        metrics = {**event.metrics, **best}
        if isinstance(event, loop.StepReport):
            self._steps = frozenset(metrics)
        # The mean of an epoch is no further point on the curve of its steps.
        else:
            metrics = {f"{name}_epoch" if name in self._steps else name: value for name, value in metrics.items()}
        self._record.metrics({event.step: metrics})
        self._seen(event)


def _train(
    job: Job, splits: datasets.Splits, report: Report, *, device: torch.device, listener: _Listener | None = None
) -> dict[str, float | str]:
    """`work` on one rank; the first has a listener and writes the checkpoints."""
    assert job.run is not None
    clock = _Clock()
    best: dict[str, float] = {}
    metrics: dict[str, float | str] = {}
    for event in clock.time(loop.train(job.config, splits, device=device)):
        if isinstance(event, loop.StepReport):
            if listener is not None:
                listener(event, {})
            continue
        if isinstance(event, loop.CheckpointReport):
            continue
        better = not best or event.metrics["val/score"] > best["best/score"]
        if better:
            best = {f"best/{name}": event.metrics[f"val/{name}"] for name in BEST} | {"best/epoch": event.epoch}
        metrics = {**event.metrics, **best, "epoch": event.epoch, "loop_seconds": clock.seconds}
        metrics["run_id"] = job.run.run_id
        if listener is not None:
            listener(event, best)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "checkpoint" if better and listener is not None else None
            if folder is not None:
                info = {"epoch": event.epoch, "step": event.step, "metrics": event.metrics}
                checkpoint.save(folder, event.encoder, job.config, info=info, state=event.state)
            report(metrics, folder)
    return metrics


class _Clock:
    """Adds up the time that an iterator spends between its items."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def time(self, events: Iterator[loop.Report]) -> Iterator[loop.Report]:
        while True:
            began = time.perf_counter()
            event = next(events, None)
            self.seconds += time.perf_counter() - began
            if event is None:
                return
            yield event

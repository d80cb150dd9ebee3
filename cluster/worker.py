"""What every worker does: dml.loop, with its reports passed on to Ray and MLflow.

A trial with one worker calls `work` in its own process; with more, Ray Train calls it in each of theirs.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from cluster.tracking import Run, Store
from dml import checkpoint, gather, loop
from dml.config import Config
from dml.data import datasets

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
    """

    config: Config
    name: str
    store: Store
    parent: str | None = None
    key: str = ""
    tags: dict[str, str] = field(default_factory=dict)


class TrainingError(RuntimeError):
    """A worker failed; one line with its rank and its error."""


class Report(Protocol):
    """Takes an epoch's metrics, with the checkpoint folder of a new best epoch (None otherwise), on every rank."""

    def __call__(self, metrics: dict[str, float | str], folder: Path | None) -> None: ...  # noqa: D102


def work(job: Job, report: Report, *, device: torch.device) -> dict[str, float | str]:
    """Trains; reports after each evaluated epoch; returns the last report.

    The reported metrics hold the epoch's own figures (val/..., train/...) and, under best/..., those of the best epoch
    so far by score, whose checkpoint is the one that is kept; loop_seconds is the time spent training and evaluating.

    Raises:
        Whatever the training raises, after the MLflow run is ended as FAILED with the reason in its tag "error".
    """
    splits = datasets.load(job.config.data)
    if gather.rank(gather.default_group()) != 0:
        return _train(job, splits, report, device=device, run=None)
    tags = {**job.tags, "data.fingerprint": splits.fingerprint}
    run = job.store.start(job.name, params=job.config.flat, tags=tags, parent=job.parent, key=job.key)
    with run.closing():
        return _train(job, splits, report, device=device, run=run)


def _train(
    job: Job, splits: datasets.Splits, report: Report, *, device: torch.device, run: Run | None
) -> dict[str, float | str]:
    """`work` on one rank; the first has the MLflow run and writes the checkpoints."""
    clock = _Clock()
    steps: dict[int, dict[str, float]] = {}
    best: dict[str, float] = {}
    metrics: dict[str, float | str] = {}
    for event in clock.time(loop.train(job.config, splits, device=device)):
        if isinstance(event, loop.StepReport):
            steps[event.step] = event.metrics
            continue
        if isinstance(event, loop.CheckpointReport):
            continue
        better = not best or event.metrics["val/score"] > best["best/score"]
        if better:
            best = {f"best/{name}": event.metrics[f"val/{name}"] for name in BEST} | {"best/epoch": event.epoch}
        metrics = {**event.metrics, **best, "epoch": event.epoch, "loop_seconds": clock.seconds}
        if run is not None:
            metrics["run_id"] = run.run_id
            steps[event.step] = {**steps.get(event.step, {}), **event.metrics, **best}
            run.metrics(steps)
            steps = {}
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "checkpoint" if better and run is not None else None
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

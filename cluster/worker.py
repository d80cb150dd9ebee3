"""What every worker does: dml.loop, with its reports passed on to Ray and MLflow.

A trial with one worker calls `work` in its own process; with more, Ray Train calls it in each of theirs.
"""

import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from cluster import run_folder
from cluster.tracking import Run, Store
from dml import checkpoint, gather, loop
from dml.config import Config
from dml.data import datasets
from dml.state import State

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
        init: the encoder's first weights (`dml.checkpoint.warm_start`); None for those that config gives it.
        init_from: where these came from.
    """

    config: Config
    name: str
    store: Store
    parent: str | None = None
    key: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    init: Mapping[str, Tensor] | None = None
    init_from: str = ""


class Report(Protocol):
    """Takes metrics, on every rank; on the first with the folder of a checkpoint where one was written, else None."""

    def __call__(self, metrics: dict[str, float | str], folder: Path | None) -> None: ...  # noqa: D102


def work(
    job: Job, report: Report, *, device: torch.device, resume: State | None = None, every: bool = False
) -> dict[str, float | str]:
    """Trains; reports after each evaluated epoch; returns the last report.

    The reported metrics hold the epoch's own figures (val/..., train/...) and, under best/..., those of the best epoch
    so far by score; loop_seconds is the time spent training and evaluating; checkpoint_rank is that of
    `cluster.run_folder`. A report between epochs repeats the figures of the last.

    Args:
        job: what to train.
        report: called on every rank.
        device: where this rank computes.
        resume: goes on from here, with the figures that were last reported.
        every: writes every checkpoint that the loop offers, to go on from; else that of each new best epoch, for its
            model.

    Raises:
        Whatever the training raises, after the MLflow run is ended as FAILED with the reason in its tag "error".
    """
    splits = datasets.load(job.config.data)
    if gather.rank(gather.default_group()) != 0:
        return _train(job, splits, report, device=device, run=None, resume=resume, every=every)
    tags = {**job.tags, "data.fingerprint": splits.fingerprint} | ({"init": job.init_from} if job.init_from else {})
    run = job.store.start(job.name, params=job.config.flat, tags=tags, parent=job.parent, key=job.key)
    with run.closing():
        return _train(job, splits, report, device=device, run=run, resume=resume, every=every)


def _train(
    job: Job,
    splits: datasets.Splits,
    report: Report,
    *,
    device: torch.device,
    run: Run | None,
    resume: State | None,
    every: bool,
) -> dict[str, float | str]:
    """`work` on one rank; the first has the MLflow run and writes the checkpoints."""
    figures = _Figures({} if resume is None else resume.info["report"])
    clock = _Clock(float(figures.now.get("loop_seconds", 0.0)))
    steps: dict[int, dict[str, float]] = {}
    for event in clock.time(loop.train(job.config, splits, device=device, resume=resume, init=job.init)):
        if isinstance(event, loop.StepReport):
            steps[event.step] = event.metrics
            continue
        better = figures.take(event, clock.seconds)
        if run is not None:
            figures.now["run_id"] = run.run_id
            if isinstance(event, loop.EpochReport):
                steps[event.step] = {**steps.get(event.step, {}), **event.metrics, **figures.best}
            # Before the checkpoint: what is not written by then, nobody writes who goes on from it.
            run.metrics(steps)
            steps = {}
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "checkpoint" if (better or every) and run is not None else None
            if folder is not None:
                checkpoint.save(
                    folder,
                    event.encoder,
                    job.config,
                    info=_info(job, event, figures.now),
                    state=event.state if every else None,
                )
            report(dict(figures.now), folder)
    return figures.now


def _info(
    job: Job, event: loop.EpochReport | loop.CheckpointReport, report: Mapping[str, float | str]
) -> dict[str, object]:
    own = {"epoch": event.epoch, "metrics": event.metrics} if isinstance(event, loop.EpochReport) else {"metrics": {}}
    return {"step": event.step, **own, "init": job.init_from, "report": dict(report)}


class _Figures:
    """What is reported: the figures of the last epoch and of the best."""

    def __init__(self, report: Mapping[str, float | str]) -> None:
        self.now = dict(report)
        self._bests = math.ceil(float(report.get(run_folder.RANK, 0)))

    @property
    def best(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.now.items() if name.startswith("best/")}

    def take(self, event: loop.EpochReport | loop.CheckpointReport, seconds: float) -> bool:
        """Takes in a report of the loop; says whether it is a new best epoch's."""
        better = False
        if isinstance(event, loop.EpochReport):
            best, score = self.best, event.metrics["val/score"]
            better = not best or math.isnan(best["best/score"]) or score > best["best/score"]
            if better:
                best = {f"best/{name}": event.metrics[f"val/{name}"] for name in BEST} | {"best/epoch": event.epoch}
                self._bests += 1
            self.now = {**event.metrics, **best, "epoch": event.epoch}
        self.now |= {"step": event.step, "loop_seconds": seconds}
        self.now[run_folder.RANK] = run_folder.rank(self._bests, best=better)
        return better


class _Clock:
    """Adds up the time that an iterator spends between its items."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def time(self, events: Iterator[loop.Report]) -> Iterator[loop.Report]:
        while True:
            began = time.perf_counter()
            event = next(events, None)
            self.seconds += time.perf_counter() - began
            if event is None:
                return
            yield event

"""What every worker does: dml.loop, with its reports passed on to Ray and MLflow.

A trial with one worker calls `work` in its own process; with more, Ray Train calls it in each of theirs.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from cluster import environment, run_folder, system_metrics
from cluster.tracking import Run, Store
from cluster.writer import Writer
from dml import checkpoint, gather, loop
from dml.config import Config
from dml.data import datasets
from dml.state import State

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
        init: the encoder's first weights (`dml.checkpoint.warm_start`); None for those that config gives it.
        init_from: where these came from.
        run: the MLflow run, once it is started (see `tracked`).
    """

    config: Config
    name: str
    store: Store
    parent: str | None = None
    key: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    init: Mapping[str, Tensor] | None = None
    init_from: str = ""
    run: Run | None = None


class Report(Protocol):
    """Takes metrics, on every rank; on the first with the folder of a checkpoint where one was written, else None."""

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
    tags = {**job.tags, "init": job.init_from} if job.init_from else job.tags
    run = job.store.start(
        job.name, params=job.config.flat, tags=tags, parent=job.parent, key=job.key, patience=patience
    )
    with run.ending():
        yield replace(job, run=run)


def work(
    job: Job,
    report: Report,
    *,
    device: torch.device,
    seen: Seen = lambda event: None,
    resume: State | None = None,
    every: bool = False,
) -> dict[str, float | str]:
    """Trains; reports after each evaluated epoch; returns the last report.

    The reported metrics hold the epoch's own figures (val/..., train/...) and, under best/..., those of the best epoch
    so far by score; loop_seconds is the time spent training and evaluating; checkpoint_rank is that of
    `cluster.run_folder`. A report between epochs repeats the figures of the last.

    Args:
        job: `tracked`.
        report: called on every rank.
        device: where this rank computes.
        seen: called on the first rank with everything that the loop says, as it says it.
        resume: goes on from here, with the figures that were last reported.
        every: writes every checkpoint that the loop offers, to go on from; else that of each new best epoch, for its
            model.
    """
    assert job.run is not None
    splits = datasets.load(job.config.data)
    figures = _Figures(job.run.run_id, {} if resume is None else resume.info["report"])
    clock = _Clock(float(figures.now.get("loop_seconds", 0.0)))
    events = clock.time(loop.train(job.config, splits, device=device, resume=resume, init=job.init))
    if gather.rank(gather.default_group()) != 0:
        for event in events:
            if not isinstance(event, loop.StepReport):
                figures.take(event, clock.seconds)
                report(dict(figures.now), None)
        return figures.now
    with job.run.writing() as record, system_metrics.sampling(record, job.run.began, device):
        record.tags({"data.fingerprint": splits.fingerprint, **environment.describe()})
        listener = _Listener(record, seen)
        for event in events:
            if isinstance(event, loop.StepReport):
                listener(event, {})
                continue
            better = figures.take(event, clock.seconds)
            # Before the checkpoint: what is not written by then, nobody writes who goes on from it.
            if isinstance(event, loop.EpochReport):
                listener(event, figures.best)
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "checkpoint" if better or every else None
                if folder is not None:
                    state = event.state if every else None
                    info = _info(job, event, figures.now, splits.fingerprint)
                    checkpoint.save(folder, event.encoder, job.config, info=info, state=state)
                report(dict(figures.now), folder)
    return figures.now


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


def _info(
    job: Job, event: loop.EpochReport | loop.CheckpointReport, report: Mapping[str, float | str], fingerprint: str
) -> dict[str, object]:
    own = {"epoch": event.epoch, "metrics": event.metrics} if isinstance(event, loop.EpochReport) else {"metrics": {}}
    return {"step": event.step, **own, "init": job.init_from, "fingerprint": fingerprint, "report": dict(report)}


class _Figures:
    """What is reported: the figures of the last epoch and of the best."""

    def __init__(self, run_id: str, report: Mapping[str, float | str]) -> None:
        self.now = dict(report)
        self._run_id = run_id
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
        self.now |= {"step": event.step, "loop_seconds": seconds, "run_id": self._run_id}
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

"""What a person sees of a training: how it is set up, a line an epoch, a bar in a terminal, and the end."""

import math
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import rich.console
import rich.progress

from cluster import command_line, messages
from cluster.delivery import without_password
from cluster.messages import Message
from cluster.outbox import holds
from cluster.periodically import periodically
from cluster.tracking import Run
from dml.config import Config
from dml.data import sampler
from dml.data.datasets import Splits
from dml.loop import EpochReport, StepReport

TOY = "  (toy: two val classes say little about OPIS)"
LOOK = 0.25
"""Seconds between two looks for messages."""

Event: TypeAlias = StepReport | EpochReport


class Poster:
    """On the first rank: tells the driver how far the loop is, some times a second at most.

    Args:
        run_id: whose driver; empty tells nobody.
        config: of the training.
    """

    def __init__(self, run_id: str, config: Config) -> None:
        self._run_id, self._config = run_id, config
        self._first: tuple[float, int] | None = None
        self._posted = -math.inf

    def __call__(self, event: Event) -> None:
        """Posts an epoch, or a step if none was posted just now."""
        now = time.monotonic()
        if self._first is None:
            self._first = (now, event.step)
        if isinstance(event, EpochReport):
            epochs = self._config.train.epochs
            shown = {"epoch": event.epoch, "epochs": epochs, "stopped": event.stopped, "metrics": event.metrics}
            messages.post(self._run_id, {**shown, **self._place(event, now)})
        elif now - self._posted > LOOK:
            self._posted = now
            messages.post(self._run_id, {"loss": event.metrics["train/loss"], **self._place(event, now)})

    def unsent(self, run: Run) -> None:
        """Tells the driver where records lie that have not reached MLflow: it may not see this node's disk."""
        if holds(run.unsent):
            messages.post(self._run_id, {"unsent": str(run.unsent), "host": platform.node()})

    def _place(self, event: Event, now: float) -> dict[str, float | None]:
        assert self._first is not None
        since, first = self._first
        pace = event.metrics["train/images_per_second"] / self._config.batch.size
        if event.step > first and now > since:
            pace = (event.step - first) / (now - since)  # evaluations and checkpoints included
        return {"step": event.step, "total": event.total, "left": (event.total - event.step) / pace if pace else None}


@dataclass
class Progress:
    """Shows the messages of a run on stdout: a line an epoch, and a bar beneath them in a terminal.

    Attributes:
        config: of the training.
        quiet: prints warnings, on stderr, and the end in one line.
        console: where to.
        epochs: the epoch that was reported last.
        stopped: training ended before its last epoch, since the val score rose no more.
    """

    config: Config
    quiet: bool = False
    console: rich.console.Console = field(default_factory=rich.console.Console)
    epochs: int = 0
    stopped: bool = False

    def __post_init__(self) -> None:
        """Prepares the bar."""
        self._began = time.monotonic()
        columns = ("{task.description}", rich.progress.BarColumn(), "{task.fields[figures]}")
        self._bar = rich.progress.Progress(
            *columns, console=self.console, transient=True, disable=self.quiet or not self.console.is_terminal
        )
        self._task = self._bar.add_task("starting", total=None, figures="")

    def begin(self, name: str, splits: Splits, workers: tuple[int, int]) -> None:
        """Prints the settings, and what follows from them."""
        if not self.quiet:
            command_line.print_config(self.config)
            print("", f"run {name}", *setup(self.config, splits, workers), "", sep="\n", flush=True)

    def end(self, metrics: Mapping[str, Any], checkpoint: str, run: Run, *, toy: bool) -> None:
        """Prints what came of it; one line when quiet.

        Args:
            metrics: what was reported with the checkpoint.
            checkpoint: path or URI of the best epoch's.
            run: the MLflow run.
            toy: the data are.
        """
        best = f"best epoch {metrics['best/epoch']:g}: val {figures(metrics['best/recall@1'], metrics['best/opis'])}"
        if self.quiet:
            print(f"{best}  checkpoint {checkpoint}")
            return
        print(f"\n{best}{TOY if toy else ''}")
        epochs = self.epochs or int(metrics["epoch"])
        print(f"{epochs} epoch{'s' * (epochs > 1)}, {duration(time.monotonic() - self._began)} in all")
        print(f"checkpoint {checkpoint}")
        print(f"MLflow run {run.run_id} in {without_password(run.uri)}")

    @contextmanager
    def following(self, run_id: str) -> Iterator[None]:
        """Shows what comes while the block runs."""
        with self._bar:
            try:
                with periodically("progress", LOOK, lambda: self._look(run_id)):
                    yield
            finally:
                self._look(run_id)

    def _look(self, run_id: str) -> None:
        with suppress(Exception):  # a control store that does not answer now is no reason to stop
            for message in messages.take(run_id):
                self.show(message)

    def show(self, message: Message) -> None:
        """Shows one message."""
        if "warning" in message:
            command_line.warn(message["warning"])
        elif "unsent" in message:
            folder = Path(message["unsent"])
            if not folder.exists():  # else the driver tries once more, and says so itself
                command_line.warn(
                    f"not everything has reached MLflow; the rest lies on node {message['host']} in {folder}. "
                    f"Send it from there: python -m cluster.tracking flush --outbox {folder.parent}"
                )
        elif "metrics" in message:
            self.epochs, self.stopped = message["epoch"], message["stopped"]
            self._say(epoch_line(message))
            if self.stopped:
                self._say(f"stopped early: no better val score in {self.config.train.patience} evaluations")
            self._move(message, "")
        else:
            self._move(message, f"loss {message['loss']:.4f}")

    def _say(self, line: str) -> None:
        if self.quiet:
            return
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self.console.file.flush()

    def _move(self, message: Message, loss: str) -> None:
        """Sets the bar to the place inside the epoch that is at work."""
        per_epoch = message["total"] // self.config.train.epochs
        epoch, step = divmod(message["step"], per_epoch)
        if step == 0 and loss:  # its last step; evaluation is next
            epoch, step = epoch - 1, per_epoch
        doing = f"epoch {epoch + 1}/{self.config.train.epochs}"
        if (message["step"] == message["total"] and not loss) or self.stopped:
            doing, step = "finishing", per_epoch
        figures = "  ".join(part for part in (f"step {step}/{per_epoch}", loss, left(message["left"])) if part)
        self._bar.update(self._task, description=doing, completed=step, total=per_epoch, figures=figures)


def setup(config: Config, splits: Splits, workers: tuple[int, int]) -> list[str]:
    """What follows from the config, the data and the fewest and most ranks, as lines."""
    train, val, batch = splits.train, splits.val, config.batch
    per_epoch = config.train.steps_per_epoch or sampler.steps_per_epoch(train.labels_N, batch)
    fewest, most = workers
    each = _span(batch.size // most, -(-batch.size // fewest))
    ranks = "1 rank" if most == 1 else f"{_span(fewest, most)} ranks x {each}"
    return [
        f"{len(train):,} training images of {len(train.classes):,} classes, "
        f"{len(val):,} val images of {len(val.classes):,} others",
        f"global batch {batch.size} = {ranks} ({batch.classes} classes x {batch.samples} images); "
        f"{per_epoch:,} steps an epoch, {config.train.epochs} epochs",
        f"learning rate {config.optim.lr:g}: that of the global batch, the same for any number of ranks",
    ]


def _span(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


def epoch_line(message: Mapping[str, Any]) -> str:
    """An epoch's figures: loss, val Recall@1, OPIS, images a second, time left."""
    metrics, epochs = message["metrics"], str(message["epochs"])
    parts = [
        f"epoch {message['epoch']:>{len(epochs)}}/{epochs}",
        f"loss {metrics['train/loss']:.4f}",
        f"val {figures(metrics['val/recall@1'], metrics['val/opis'])}",
        f"{metrics['train/images_per_second']:,.0f} images/s",
        "" if message["stopped"] else left(message["left"]),
    ]
    return "  ".join(part for part in parts if part)


def figures(recall: float, opis: float) -> str:
    """Recall@1 and OPIS, which are quoted together."""
    return f"Recall@1 {recall:.4f}  OPIS {opis:.5f}"


def left(seconds: float | None) -> str:
    """2:05 left; nothing at the end, or where it is not known."""
    return f"{duration(seconds)} left" if seconds else ""


def duration(seconds: float) -> str:
    """0:07, 12:30, 1:02:03, 3 days 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02}:{rest:02}" if hours or days else f"{minutes}:{rest:02}"
    return f"{days} day{'s' * (days > 1)} {clock}" if days else clock

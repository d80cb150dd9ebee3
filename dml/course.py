"""The course of a training: how far it has come, and what is due when."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

from dml.config import Config
from dml.early_stopping import EarlyStopping
from dml.state import Progress, State


class Course:
    """How far a training has come, and what is due at this step.

    Args:
        config: everything about the run.
        per_epoch: steps of an epoch.
        fingerprint: of the data.
        resume: where to go on from; None begins.

    Attributes:
        step: steps done; the loop moves it.
        total: steps of the whole training.
        losses: mean loss over ranks of each step of the running epoch that was read.
        without_loss: how many of them were 0, TCM aside.
        stopping: sees each val score.
    """

    def __init__(self, config: Config, per_epoch: int, fingerprint: str, resume: State | None) -> None:
        start = Progress(step=0, fingerprint=fingerprint) if resume is None else resume.progress
        self.config, self.per_epoch, self.fingerprint = config, per_epoch, fingerprint
        self.total = per_epoch * config.train.epochs
        self.step = start.step
        self.losses, self.without_loss = [*start.losses], start.without_loss
        self.stopping = EarlyStopping(config.train.patience)
        self.stopping.restore(start.best, start.waited)

    @property
    def progress(self) -> float:
        """Fraction of training done, in [0, 1]."""
        return self.step / self.total

    @property
    def ended(self) -> bool:
        """Whether no step is left, or patience."""
        return self.step >= self.total or self.stopping.exhausted

    @property
    def epoch_ends(self) -> bool:
        """Whether this step was the last of its epoch."""
        return self.step % self.per_epoch == 0

    @property
    def saves(self) -> bool:
        """Whether train.checkpoint_every_steps asks for a checkpoint."""
        every = self.config.train.checkpoint_every_steps
        return every is not None and self.step % every == 0

    @property
    def reads(self) -> bool:
        """Whether the losses are read; before a checkpoint too, so that it holds them, and none that is not finite."""
        return self.step % self.config.train.log_every == 0 or self.epoch_ends or self.saves

    @property
    def evaluates(self) -> bool:
        """Whether the epoch that ends here is evaluated."""
        return self.step % (self.per_epoch * self.config.train.eval_every) == 0 or self.step == self.total

    def count(self, values: list[float], zeros: int) -> None:
        """Takes in the losses of the steps since the last reading.

        Args:
            values: their means over ranks.
            zeros: how many were 0, TCM aside.
        """
        self.losses += values
        self.without_loss += zeros

    def close_epoch(self) -> dict[str, float]:
        """What the losses of the epoch came to; the next one's are counted anew."""
        told = {
            "train/loss": sum(self.losses) / len(self.losses),
            "train/batches_without_loss": float(self.without_loss),
        }
        self.losses, self.without_loss = [], 0
        return told

    @contextmanager
    def noting_errors(self, but: type[Exception]) -> Iterator[None]:
        """Adds to an error that leaves the block at which step it came, and after which losses.

        Args:
            but: errors that say so themselves.
        """
        try:
            yield
        except but:
            raise
        except Exception as error:
            last = ", ".join(f"{loss:.4g}" for loss in self.losses[-6:]) or "none read yet in this epoch"
            error.add_note(f"after {self.step} of {self.total} steps; last losses: {last}")
            raise

    def at(self, ema_updates: int) -> Progress:
        """What a checkpoint keeps of it."""
        best = self.stopping.best
        return Progress(
            step=self.step,
            losses=tuple(self.losses),
            without_loss=self.without_loss,
            best=best if math.isfinite(best) else None,
            waited=self.stopping.waited,
            ema_updates=ema_updates,
            fingerprint=self.fingerprint,
        )

"""Where a training stands: all that it needs, beside its data, to go on as if it had never stopped.

What is not here follows from what is: learning rates, TCM's weight and the thaw of a backbone are functions of the
step; batches, augmentation, miners and dropout draw by (seed, epoch, step, ...) alone (dml.draws), so that no generator
has a state. An embedding-driven sampler's plan is here, since the encoder that chose it is gone.

Ranks share one state, rank 0's. Weights, optimiser and memory are equal on all; where each rank has BatchNorm
statistics of its own, rank 0's are what DDP gives to all before every step, and what an epoch ends with.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from dml.config import Config, Section


class StateError(ValueError):
    """A state that this training cannot go on from; the message names what differs."""


class Progress(Section):
    """How far a training has come: what is no tensor."""

    step: Annotated[int, Field(ge=0)]
    """Steps done since the start of training."""
    losses: tuple[float, ...] = ()
    """Mean loss over ranks of each step of the running epoch; empty at its end."""
    without_loss: int = 0
    """Batches of the running epoch whose loss was 0, TCM aside."""
    best: float | None = None
    """Highest val/score so far; None before the first evaluation."""
    waited: int = 0
    """Evaluations since then."""
    ema_updates: int = 0
    """Updates of the moving average of the weights."""
    fingerprint: str = ""
    """Of the data (Splits.fingerprint)."""


@dataclass(frozen=True, eq=False)
class State:
    """A training at one step. One that the loop reports holds the live tensors: save it before the next report.

    Attributes:
        config: everything about the run.
        progress: how far it has come.
        parts: tensors by part and name. encoder: the one that is evaluated; training_encoder: the one in training,
            where the other is its average; loss: its own parameters; optimizer (`dml.optim.state`); memory; plan.
            A part without tensors may be left out.
        info: what the writer of a checkpoint added; empty as the loop reports it.
    """

    config: Config
    progress: Progress
    parts: Mapping[str, Mapping[str, Tensor]]
    info: Mapping[str, Any] = field(default_factory=dict)

    def check(self, config: Config, fingerprint: str) -> None:
        """Refuses to go on with other settings or other data.

        Args:
            config: of the training that would go on.
            fingerprint: of its data.

        Raises:
            StateError: settings or data differ; the message names each setting with both values.
        """
        changed = differences(self.config, config)
        if changed:
            raise StateError(f"a run goes on with the settings that it began with, but {'; '.join(changed)}")
        if self.progress.fingerprint != fingerprint:
            raise StateError(
                f"the data are not those that the run began with: fingerprint {fingerprint}, then "
                f"{self.progress.fingerprint}"
            )


def differences(before: Config, after: Config) -> list[str]:
    """The settings in which two configs differ, in words: ["optim.lr is 0.01, was 0.001"]."""
    old, new = before.flat, after.flat
    names = [*old, *(name for name in new if name not in old)]
    return [f"{name} is {new.get(name)}, was {old.get(name)}" for name in names if old.get(name) != new.get(name)]

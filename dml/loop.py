"""The training loop: a generator that trains and says what happened; it knows nothing of who listens.

On several ranks of torch.distributed every rank runs it and gets its reports at the same steps.

Exactness. A training that goes on from a State, on the same kind of device and as many ranks, does what it would have
done: on CPUs with 1 or 2 ranks its weights are the same bit for bit. With more ranks gloo adds in an order that depends
on where a gradient lies in DDP's buckets, which DDP lays out anew after its first step: sums then differ in their last
bits, as they do on another number of ranks or on GPUs.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dml import evaluate as evaluation
from dml import gather
from dml.config import Config
from dml.course import Course
from dml.data import datasets, sampler
from dml.data.datasets import Splits
from dml.data.loader import batches
from dml.encoders import Encoder
from dml.learner import Learner
from dml.pace import Pace
from dml.plans import Plans
from dml.state import State


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient became NaN or infinite; the message names step, ranks and the last losses."""


@dataclass(frozen=True)
class StepReport:
    """What the last `log_every` steps came to.

    Attributes:
        step: steps done since the start of training.
        metrics: means over these steps and over ranks: train/loss, train/loss_base (without TCM), train/gradient_norm
            (of the encoder, before clipping); train/images_per_second (all ranks) and train/data_wait (share of the
            time that this rank waited for images); as they are now: train/lr (the backbone's), train/lr_projection,
            train/lr_loss (where the loss has parameters), train/tcm_weight, train/ranks, and the losses' stats (means
            over ranks).
        total: steps of the whole training.
    """

    step: int
    metrics: dict[str, float]
    total: int


@dataclass(frozen=True)
class EpochReport:
    """An evaluated epoch.

    Attributes:
        epoch: epochs done, from 1.
        step: steps done since the start of training.
        metrics: val/... of dml.evaluate; train/pi_intra and the other figures of dml.metrics.space on a fixed sample of
            the training images; over the epoch train/loss, train/images_per_second, train/data_wait and
            train/batches_without_loss (batches whose loss was 0, TCM aside: none had a tuple that counts).
        encoder: the trained module itself, or the moving average of its weights with optim.ema, which the
            metrics are of. Not a copy: save it before asking for the next report.
        state: what the training goes on from; its tensors are no copies either.
        total: steps of the whole training.
        stopped: training ends here, before its last epoch, since train.patience is exhausted.
    """

    epoch: int
    step: int
    metrics: dict[str, float]
    encoder: Encoder
    state: State
    total: int
    stopped: bool = False


@dataclass(frozen=True)
class CheckpointReport:
    """A step between evaluations to go on from, every train.checkpoint_every_steps.

    Attributes:
        step: steps done since the start of training.
        encoder: as of an EpochReport.
        state: as of an EpochReport.
    """

    step: int
    encoder: Encoder
    state: State


Report = StepReport | EpochReport | CheckpointReport


def train(
    config: Config,
    splits: Splits,
    *,
    device: torch.device,
    resume: State | None = None,
    init: Mapping[str, Tensor] | None = None,
) -> Iterator[Report]:
    """Trains an encoder on splits.train, evaluating it on splits.val.

    The batch of a step depends on (seed, epoch, step) alone and the augmentation of a sample on (seed, epoch, sample),
    so W ranks train on what one would. Gradients follow the rule of dml.gather.

    Args:
        config: everything about the run.
        splits: class-disjoint data; test is not touched.
        device: where this rank computes.
        resume: goes on from here, the same on every rank; the reports are those that would have followed.
        init: weights that the encoder starts from (`checkpoint.warm_start`), the same on every rank.

    Yields:
        A StepReport every config.train.log_every steps and before a checkpoint, an EpochReport for every evaluated
        epoch, a CheckpointReport every config.train.checkpoint_every_steps unless an EpochReport is due.

    Raises:
        NonFiniteLossError: within log_every steps after a loss or gradient became NaN or infinite. That step and those
            after it have changed no weight.
        Exception: whatever else a step raises, an image that cannot be read or memory that is short, with a note of
            the step and the last losses.
        DataError: splits that cannot be trained on.
        ValueError: more ranks than images in a batch.
        StateError: resume is of other settings or other data.
    """
    group = gather.default_group()
    check(splits, config, gather.world(group))
    if resume is not None:
        resume.check(config, splits.fingerprint)
    per_epoch = config.train.steps_per_epoch or sampler.steps_per_epoch(splits.train.labels_N, config.batch)
    course = Course(config, per_epoch, splits.fingerprint, resume)
    run = Learner(config, len(splits.train.classes), device, group, progress=course.progress, resume=resume, init=init)
    plans = Plans(run.encoder, splits.train, config, per_epoch, device=device, group=group)
    if resume is not None and "plan" in resume.parts:
        plans.restore(resume.parts["plan"]["plan"].numpy(), (course.step - 1) // per_epoch)
    sample = evaluation.train_sample(splits.train, config)
    with course.noting_errors(but=NonFiniteLossError):
        while not course.ended:
            epoch = course.step // per_epoch
            plan = plans.epoch(epoch)[course.step % per_epoch :]
            recent: list[Tensor] = []
            loader = batches(
                splits.train,
                config,
                plan,
                epoch=epoch,
                rank=gather.rank(group),
                world=gather.world(group),
                pinned=device.type == "cuda",
            )
            pace = Pace()
            began = last = pace.mark()
            for batch in pace.waiting(loader):
                recent.append(run.step(batch, course.step, course.progress))
                course.step += 1
                if course.reads:
                    values, zeros, means = _read(recent, course.step, course.losses, group)
                    course.count(values, zeros)
                    means |= pace.since(last, config.batch.size) | run.stats()
                    recent, last = [], pace.mark()
                    yield StepReport(course.step, means, course.total)
                if course.saves and not course.epoch_ends:
                    yield CheckpointReport(course.step, run.evaluated, run.state(course, plans))
            # Ranks that evaluate, or choose batches, with statistics of their own would not have one encoder.
            run.share_buffers()
            told = course.close_epoch() | pace.since(began, config.batch.size)
            if course.evaluates:
                metrics = evaluation.evaluate(run.evaluated, splits.val, config, device=device, group=group)
                metrics |= evaluation.space_of(run.evaluated, sample, config, device=device, group=group) | told
                stopped = course.stopping.done(metrics["val/score"]) and course.step < course.total
                state = run.state(course, plans)
                yield EpochReport(epoch + 1, course.step, metrics, run.evaluated, state, course.total, stopped)
            elif course.saves:
                yield CheckpointReport(course.step, run.evaluated, run.state(course, plans))


def check(splits: Splits, config: Config, ranks: int = 1) -> None:
    """Refuses what cannot be trained.

    Args:
        splits: class-disjoint data.
        config: everything about the run.
        ranks: that train together; the most, where their number changes.

    Raises:
        DataError: splits that cannot be trained on, or not be evaluated, with this config.
        ValueError: more ranks than images in a batch.
    """
    batch = config.batch
    if ranks > batch.size:
        raise ValueError(
            f"{ranks} workers cannot share a batch of {batch.size} images (batch.classes {batch.classes} x "
            f"batch.samples {batch.samples}); at most {batch.size} workers, or larger batches"
        )
    datasets.check(splits, config.batch)
    evaluation.check(splits.val, config.evaluate)


def _read(
    recent: list[Tensor], step: int, before: list[float], group: gather.Group | None
) -> tuple[list[float], int, dict[str, float]]:
    """The mean losses over ranks of the recent steps, how many were 0 without TCM, and the means over the steps.

    Raises at the first step whose loss or gradient norm is not finite, on every rank.
    """
    mine = torch.stack(recent)
    steps = (gather.sum_over_ranks(mine, group) / gather.world(group)).cpu()
    values: list[float] = steps[:, 0].tolist()
    broken = (~steps.isfinite()).any(dim=1).nonzero()
    if len(broken):
        raise NonFiniteLossError(_broken(int(broken[0]), mine, step, [*before, *values], group))
    loss, base, _, norm = steps.mean(dim=0).tolist()
    means = {"train/loss": loss, "train/loss_base": base, "train/gradient_norm": norm}
    return values, int((steps[:, 2] == 0).sum()), means


def _broken(index: int, mine: Tensor, step: int, losses: list[float], group: gather.Group | None) -> str:
    """What is wrong with one of the recent steps. A collective."""
    count, world = len(mine), gather.world(group)
    loss, *_, norm = gather.gather(mine[index : index + 1], [1] * world, group).T.tolist()
    ranks = [rank for rank, value in enumerate(loss) if not math.isfinite(value)]
    what = f"loss is {loss[ranks[0]]}" if ranks else f"the norm of the gradient is {norm[0]}"
    where = f" on rank {', '.join(map(str, ranks))} of {world}" if ranks and world > 1 else ""
    last = ", ".join(f"{value:.4g}" for value in losses[: len(losses) - count + index + 1][-6:])
    at = step - count + index + 1
    return f"{what} at step {at}{where}; last losses: {last}. A lower optim.lr or optim.clip usually helps"

"""The training loop: a generator that trains and says what happened; it knows nothing of who listens.

On several ranks of torch.distributed every rank runs it and gets its reports at the same steps.

Exactness. A training that goes on from a State, on the same kind of device and as many ranks, does what it would have
done: on CPUs with 1 or 2 ranks its weights are the same bit for bit. With more ranks gloo adds in an order that depends
on where a gradient lies in DDP's buckets, which DDP lays out anew after its first step: sums then differ in their last
bits, as they do on another number of ranks or on GPUs.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dml import encoders, gather, gradient_cache, losses, optim
from dml import evaluate as evaluation
from dml.config import Config, TCMConfig
from dml.course import Course
from dml.data import datasets, sampler
from dml.data.datasets import Splits
from dml.data.images import normalise
from dml.data.loader import Batch, batches
from dml.ema import EMA
from dml.encoders import Encoder
from dml.losses.tcm import TCM
from dml.memory import Memory
from dml.pace import Pace
from dml.pairs import Pairs
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
            train/lr_loss (where the loss has parameters), train/tcm_weight, train/ranks, and the losses' stats.
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
        StateError: resume is of other settings or other data.
    """
    check(splits, config)
    if resume is not None:
        resume.check(config, splits.fingerprint)
    group = gather.default_group()
    per_epoch = config.train.steps_per_epoch or sampler.steps_per_epoch(splits.train.labels_N, config.batch)
    course = Course(config, per_epoch, splits.fingerprint, resume)
    run = _Run(config, len(splits.train.classes), device, group, progress=course.progress, resume=resume, init=init)
    plans = Plans(run.encoder, splits.train, config, per_epoch, device=device, group=group)
    if resume is not None and "plan" in resume.parts:
        plans.restore(resume.parts["plan"]["plan"].numpy(), (course.step - 1) // per_epoch)
    sample = evaluation.train_sample(splits.train, config)
    with course.noting_errors():
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


def check(splits: Splits, config: Config) -> None:
    """Raises DataError when these splits cannot be trained on, or not be evaluated, with this config."""
    datasets.check(splits, config.batch)
    evaluation.check(splits.val, config.evaluate)


class _Run:
    """Model, losses and optimiser of one training, and one step of it."""

    def __init__(
        self,
        config: Config,
        num_classes: int,
        device: torch.device,
        group: gather.Group | None,
        *,
        progress: float = 0.0,
        resume: State | None = None,
        init: Mapping[str, Tensor] | None = None,
    ) -> None:
        # Weights that are at hand need none that others published.
        built = config.encoder if resume is None and init is None else config.encoder.bare
        # Forked, so that the caller's own draws do not depend on whether it trained; seeded, so that ranks start equal.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            encoder = encoders.build(built, channels=config.data.channels, image_size=config.data.image_size)
            self.loss = losses.from_config(config.loss, num_classes=num_classes, dim=config.encoder.dim).to(device)
        if init is not None:
            encoder.load_state_dict(init)
        self.memory: Memory | None = None
        if config.memory.size > 0:
            if not self.loss.takes_memory:
                raise ValueError(f"loss {config.loss.name} takes no memory; set memory.size 0")
            self.memory = Memory(config.memory.size, config.encoder.dim).to(device)
        # DDP does not wrap it, and a loss from outside may draw its parameters from a seed of its own.
        gather.broadcast([*self.loss.parameters(), *self.loss.buffers()], group)
        encoder = encoders.set_batch_norm(encoder, config.encoder, device)
        self.encoder = encoder.to(device).to(memory_format=torch.channels_last)
        self.config, self.device, self.group = config, device, group
        self.ema = EMA(self.encoder, config.optim.ema) if config.optim.ema > 0 else None
        self.optimizer = optim.build(self.encoder, self.loss, config.optim)
        if resume is not None:
            self._restore(resume)
        self.encoder.freeze_backbone(progress < config.optim.frozen_backbone)
        self.forward = self._wrapped()
        tcm = config.tcm
        self.tcm = TCM(tcm.margin_pos, tcm.margin_neg, tcm.weight_pos, tcm.weight_neg)
        self.weight = 0.0
        # Read by torch's fused optimisers, as for gradient scaling: where it is 1 they leave everything as it is.
        self.broken = torch.zeros((), dtype=torch.float32, device=device)
        self.optimizer.found_inf = self.broken  # type: ignore[attr-defined]

    def _restore(self, state: State) -> None:
        parts = state.parts
        self.encoder.load_state_dict(parts.get("training_encoder", parts["encoder"]))
        if self.ema is not None:
            self.ema.encoder.load_state_dict(parts["encoder"])
            self.ema.updates = state.progress.ema_updates
        self.loss.load_state_dict(parts.get("loss", {}))
        if self.memory is not None:
            self.memory.load_state_dict(parts["memory"])
        optim.restore(self.optimizer, self.encoder, self.loss, parts.get("optimizer", {}))

    def state(self, course: Course, plans: Plans) -> State:
        """What the training goes on from; its tensors are the training's own."""
        parts: dict[str, Mapping[str, Tensor]] = {
            "encoder": self.evaluated.state_dict(),
            "loss": self.loss.state_dict(),
            "optimizer": optim.state(self.optimizer, self.encoder, self.loss),
        }
        if self.ema is not None:
            parts["training_encoder"] = self.encoder.state_dict()
        if self.memory is not None:
            parts["memory"] = self.memory.state_dict()
        if plans.stored is not None:
            parts["plan"] = {"plan": torch.from_numpy(plans.stored)}
        return State(self.config, course.at(0 if self.ema is None else self.ema.updates), parts)

    def share_buffers(self) -> None:
        """Gives every rank the buffers of rank 0."""
        gather.broadcast(self.encoder.buffers(), self.group)
        if self.ema is not None:
            gather.broadcast(self.ema.encoder.buffers(), self.group)

    @property
    def evaluated(self) -> Encoder:
        """The encoder that is evaluated and kept: the moving average where there is one."""
        return self.encoder if self.ema is None else self.ema.encoder

    def _wrapped(self) -> nn.Module:
        """The encoder as it is trained: in DDP on several ranks, and compiled by option. Evaluation uses it bare."""
        if self.config.train.compile:
            encoders.check_compiler(self.device)
        if self.group is None:
            return cast(nn.Module, torch.compile(self.encoder)) if self.config.train.compile else self.encoder
        device_ids = [self.device] if self.device.type == "cuda" else None
        parallel = DistributedDataParallel(self.encoder, device_ids=device_ids)
        if self.config.train.compile:
            parallel.compile()  # around DDP, so that the graph is cut where DDP's buckets end
        return parallel

    def step(self, batch: Batch, step: int, progress: float) -> Tensor:
        """One step on this rank's slice; returns (4,), detached: what `_learn` does, and the norm of the gradient."""
        config = self.config
        if self.encoder.backbone_frozen and progress >= config.optim.frozen_backbone:
            self.encoder.freeze_backbone(False)
            self.forward = self._wrapped()
        optim.set_rates(self.optimizer, progress, config.optim)
        self.weight = tcm_weight(progress, config.tcm)
        self.optimizer.zero_grad(set_to_none=True)
        within = functools.partial(self._within, step)
        prepare = functools.partial(normalise, config=config.data)
        if config.train.micro_batch is None:
            with within(0):
                embeddings = self.forward(prepare(_to(batch.images, self.device)))
            values = self._learn(embeddings, batch, step, progress)
        else:
            images = batch.images.pin_memory() if self.device.type == "cuda" else batch.images
            largest = -(-config.batch.size // gather.world(self.group))
            chunks = gradient_cache.split(images, config.train.micro_batch, largest)
            embeddings = gradient_cache.embed(self.forward, chunks, within, prepare)
            values = self._learn(embeddings, batch, step, progress)
            assert embeddings.grad is not None  # a loss is connected, whatever its value
            gradient_cache.backward(self.forward, chunks, embeddings.grad, within, prepare)
        gather.average_gradients(self.loss, self.group)
        norm = self._clip()
        # Without asking the device. Gradients are averaged, so all ranks find the same; the weights stay those of
        # before, in this step and, since statistics and memory have seen it, in all that follow.
        self.broken.copy_(torch.maximum(self.broken, (~norm.isfinite()).to(self.broken)))
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.encoder)
        return torch.cat([values, norm.reshape(1).to(values)])

    def _clip(self) -> Tensor:
        """Clips the encoder's gradient where the config says so.

        Returns:
            The norm that it had; not finite where the gradient of the loss's own parameters is not.
        """
        parameters, clip = list(self.encoder.parameters()), self.config.optim.clip
        norm = nn.utils.clip_grad_norm_(parameters, clip) if clip > 0 else _norm(parameters)
        return norm + 0 * _norm(list(self.loss.parameters()))

    def _learn(self, embeddings: Tensor, batch: Batch, step: int, progress: float) -> Tensor:
        """The loss and its backward pass, as far as the embeddings' graph reaches.

        Returns (3,), detached: this rank's loss, its loss without TCM, and the size of that.
        """
        config = self.config
        pairs = Pairs.of(
            embeddings,
            _to(batch.labels, self.device),
            ids_B=_to(batch.indices, self.device),
            key=(config.train.seed, step),
            group=self.group,
            memory=self.memory if progress >= config.memory.start else None,
        )
        base: Tensor = self.loss(pairs.extended if self.loss.takes_memory else pairs)
        loss = base + self.weight * self.tcm(pairs) if self.weight > 0 else base
        loss.backward()
        if self.memory is not None and pairs.col_ids is not None:
            self.memory.add(pairs.cols.detach(), pairs.col_labels, pairs.col_ids)
        # A comparison with NaN is false, so masks would hide broken embeddings from the loss.
        return torch.stack([loss.detach() + 0 * embeddings.detach().sum(), base.detach(), base.detach().abs()])

    @contextlib.contextmanager
    def _within(self, step: int, chunk: int) -> Iterator[None]:
        """What surrounds the encoder: draws that depend on seed, step, rank and chunk alone, and its precision."""
        key = (self.config.train.seed, step, gather.rank(self.group), chunk)
        with gradient_cache.seeded(self.device, *key), evaluation.autocast(self.config, self.device):
            yield

    def stats(self) -> dict[str, float]:
        """Learning rates, TCM weight and the losses' stats, read back from the device."""
        rates = optim.rates(self.optimizer)
        stats = {"train/lr": rates.pop("backbone"), "train/tcm_weight": self.weight}
        stats["train/ranks"] = float(gather.world(self.group))
        stats |= {f"train/lr_{part}": rate for part, rate in rates.items()}
        own = getattr(self.loss, "stats", {}) | (self.tcm.stats if self.weight > 0 else {})
        return stats | {f"train/{name}": float(value) for name, value in own.items()}


def tcm_weight(progress: float, config: TCMConfig) -> float:
    """The weight of TCM: 0 before `start`, then a linear rise over `ramp` to `weight`.

    Args:
        progress: fraction of training done, in [0, 1).
        config: weight, start and ramp.
    """
    if progress < config.start:
        return 0.0
    return config.weight * min(1.0, (progress - config.start) / config.ramp if config.ramp > 0 else 1.0)


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


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

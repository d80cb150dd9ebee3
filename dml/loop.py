"""The training loop: a generator that trains and says what happened; it knows nothing of who listens.

On several ranks of torch.distributed every rank runs it and gets its reports at the same steps.
"""

import contextlib
import functools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dml import encoders, gather, gradient_cache, losses, optim
from dml import evaluate as evaluation
from dml.config import Config, TCMConfig
from dml.data import datasets, sampler
from dml.data.datasets import Splits
from dml.data.images import normalise
from dml.data.loader import Batch, batches
from dml.data.sampler import Indices
from dml.early_stopping import EarlyStopping
from dml.ema import EMA
from dml.encoders import Encoder
from dml.losses.tcm import TCM
from dml.memory import Memory
from dml.pairs import Pairs
from dml.plans import Plans


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; the message names the step and the last losses."""


@dataclass(frozen=True)
class StepReport:
    """What the last `log_every` steps came to.

    Attributes:
        step: steps done since the start of training.
        metrics: train/loss (mean over these steps and over ranks), train/lr (the backbone's), train/lr_projection,
            train/lr_loss (where the loss has parameters), train/tcm_weight, and the losses' stats.
    """

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class EpochReport:
    """An evaluated epoch.

    Attributes:
        epoch: epochs done, from 1.
        step: steps done since the start of training.
        metrics: val/... of dml.evaluate, train/loss (mean over the epoch), train/images_per_second (all ranks),
            train/batches_without_loss (batches of the epoch whose loss was 0, TCM aside: none had a tuple that counts).
        encoder: the trained module itself, or the moving average of its weights with optim.ema, which the
            metrics are of. Not a copy: save it before asking for the next report.
        loss: the loss with its own parameters.
        plan: int64 (steps, P * K), the batches that an embedding-driven sampler has planned (dml.plans); else None.
        memory: the cross-batch memory; None without one.
        stopped: training ends here, before its last epoch, since train.patience is exhausted.
    """

    epoch: int
    step: int
    metrics: dict[str, float]
    encoder: Encoder
    loss: nn.Module
    plan: Indices | None = None
    memory: Memory | None = None
    stopped: bool = False


def train(config: Config, splits: Splits, *, device: torch.device) -> Iterator[StepReport | EpochReport]:
    """Trains an encoder on splits.train, evaluating it on splits.val.

    The batch of a step depends on (seed, epoch, step) alone and the augmentation of a sample on (seed, epoch, sample),
    so W ranks train on what one would. Gradients follow the rule of dml.gather.

    Args:
        config: everything about the run.
        splits: class-disjoint data; test is not touched.
        device: where this rank computes.

    Yields:
        A StepReport every config.train.log_every steps, an EpochReport for every evaluated epoch.

    Raises:
        NonFiniteLossError: within log_every steps after a loss became NaN or infinite.
        DataError: splits that cannot be trained on.
    """
    check(splits, config)
    group = gather.default_group()
    run = _Run(config, len(splits.train.classes), device, group)
    per_epoch = config.train.steps_per_epoch or sampler.steps_per_epoch(splits.train.labels_N, config.batch)
    plans = Plans(run.encoder, splits.train, config, per_epoch, device=device, group=group)
    total = per_epoch * config.train.epochs
    stopping = EarlyStopping(config.train.patience)
    step = 0
    for epoch in range(1, config.train.epochs + 1):
        began = time.perf_counter()
        recent: list[Tensor] = []
        epoch_losses: list[float] = []
        without_loss = 0
        plan = plans.epoch(epoch - 1)
        loader = batches(
            splits.train,
            config,
            plan,
            epoch=epoch - 1,
            rank=gather.rank(group),
            world=gather.world(group),
            pinned=device.type == "cuda",
        )
        for batch in loader:
            recent.append(run.step(batch, step, step / total))
            step += 1
            if step % config.train.log_every == 0 or step % per_epoch == 0:
                values, zeros = _read(recent, step, epoch_losses, group)
                epoch_losses += values
                without_loss += zeros
                recent = []
                yield StepReport(step, {"train/loss": sum(values) / len(values)} | run.stats())
        # Ranks that evaluate, or choose batches, by embeddings of statistics of their own would not have one encoder.
        gather.broadcast(run.encoder.buffers(), group)
        if run.ema is not None:
            gather.broadcast(run.ema.encoder.buffers(), group)
        rate = per_epoch * config.batch.size / (time.perf_counter() - began)
        if epoch % config.train.eval_every == 0 or epoch == config.train.epochs:
            metrics = evaluation.evaluate(run.evaluated, splits.val, config, device=device, group=group)
            metrics["train/loss"] = sum(epoch_losses) / len(epoch_losses)
            metrics["train/images_per_second"] = rate
            metrics["train/batches_without_loss"] = float(without_loss)
            stopped = stopping.done(metrics["val/score"]) and epoch < config.train.epochs
            yield EpochReport(epoch, step, metrics, run.evaluated, run.loss, plans.stored, run.memory, stopped)
            if stopped:
                return


def check(splits: Splits, config: Config) -> None:
    """Raises DataError when these splits cannot be trained on, or not be evaluated, with this config."""
    datasets.check(splits, config.batch)
    evaluation.check(splits.val, config.evaluate)


class _Run:
    """Model, losses and optimiser of one training, and one step of it."""

    def __init__(self, config: Config, num_classes: int, device: torch.device, group: gather.Group | None) -> None:
        # Forked, so that the caller's own draws do not depend on whether it trained; seeded, so that ranks start equal.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)
            encoder = encoders.build(config.encoder, channels=config.data.channels, image_size=config.data.image_size)
            self.loss = losses.from_config(config.loss, num_classes=num_classes, dim=config.encoder.dim).to(device)
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
        world, size = gather.world(group), config.batch.size
        self.counts = [len(sampler.rank_slice(np.arange(size), rank, world)) for rank in range(world)]
        self.ema = EMA(self.encoder, config.optim.ema) if config.optim.ema > 0 else None
        self.optimizer = optim.build(self.encoder, self.loss, config.optim)
        self.encoder.freeze_backbone(config.optim.frozen_backbone > 0)
        self.forward = self._wrapped()
        tcm = config.tcm
        self.tcm = TCM(tcm.margin_pos, tcm.margin_neg, tcm.weight_pos, tcm.weight_neg)
        self.weight = 0.0

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
        """One step on this rank's slice; returns (2,), detached: its loss, and the size of its loss without TCM."""
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
        if config.optim.clip > 0:
            nn.utils.clip_grad_norm_(self.encoder.parameters(), config.optim.clip)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.encoder)
        return values

    def _learn(self, embeddings: Tensor, batch: Batch, step: int, progress: float) -> Tensor:
        """The loss and its backward pass, as far as the embeddings' graph reaches; returns what `step` does."""
        config = self.config
        pairs = Pairs.of(
            embeddings,
            _to(batch.labels, self.device),
            ids_B=_to(batch.indices, self.device),
            key=(config.train.seed, step),
            group=self.group,
            memory=self.memory if progress >= config.memory.start else None,
            counts=self.counts,
        )
        base: Tensor = self.loss(pairs.extended if self.loss.takes_memory else pairs)
        loss = base + self.weight * self.tcm(pairs) if self.weight > 0 else base
        loss.backward()
        if self.memory is not None and pairs.col_ids is not None:
            self.memory.add(pairs.cols.detach(), pairs.col_labels, pairs.col_ids)
        # A comparison with NaN is false, so masks would hide broken embeddings from the loss.
        return torch.stack([loss.detach() + 0 * embeddings.detach().sum(), base.detach().abs()])

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


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def _read(recent: list[Tensor], step: int, before: list[float], group: gather.Group | None) -> tuple[list[float], int]:
    """The mean losses over ranks of the recent steps, and how many were 0 without TCM.

    Raises at the first loss that is NaN or infinite, on every rank.
    """
    means = (gather.sum_over_ranks(torch.stack(recent), group) / gather.world(group)).cpu()
    values: list[float] = means[:, 0].tolist()
    for index, value in enumerate(values):
        if not math.isfinite(value):
            last = ", ".join(f"{loss:.4g}" for loss in [*before, *values[: index + 1]][-6:])
            raise NonFiniteLossError(
                f"loss is {value} at step {step - len(values) + index + 1}; last losses: {last}. "
                "A lower optim.lr or optim.clip usually helps"
            )
    return values, int((means[:, 1] == 0).sum())

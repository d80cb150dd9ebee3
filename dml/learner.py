"""What is trained, and one step of it: encoder, loss, optimiser, and what else a step moves."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dml import encoders, gather, gradient_cache, losses, optim
from dml import evaluate as evaluation
from dml.config import Config, TCMConfig
from dml.course import Course
from dml.data import sampler
from dml.data.images import normalise
from dml.data.loader import Batch
from dml.ema import EMA
from dml.encoders import Encoder
from dml.losses.tcm import TCM
from dml.memory import Memory
from dml.pairs import Pairs
from dml.plans import Plans
from dml.state import State


class Learner:
    """Model, losses and optimiser of one training, and one step of it.

    Args:
        config: everything about the run.
        num_classes: C, training classes.
        device: where this rank computes.
        group: ranks that train together.
        progress: fraction of training done.
        resume: what it goes on from.
        init: weights that the encoder starts from.

    Attributes:
        encoder: the one in training.
        loss: the loss with its own parameters.
        memory: the cross-batch memory; None without one.
        broken: float32 (), 1 from the first step on whose gradient was not finite; no weight changes then.
    """

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
        world, size = gather.world(group), config.batch.size
        self.counts = [len(sampler.rank_slice(np.arange(size), rank, world)) for rank in range(world)]
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
            counts=self.counts,
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
        """Learning rates, TCM weight, and means over ranks of the losses' stats, read from the device. A collective."""
        rates = optim.rates(self.optimizer)
        stats = {"train/lr": rates.pop("backbone"), "train/tcm_weight": self.weight}
        stats["train/ranks"] = float(gather.world(self.group))
        stats |= {f"train/lr_{part}": rate for part, rate in rates.items()}
        own = getattr(self.loss, "stats", {}) | (self.tcm.stats if self.weight > 0 else {})
        if not own:
            return stats
        mine = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=self.device) for value in own.values()])
        means = gather.sum_over_ranks(mine, self.group) / gather.world(self.group)
        return stats | {f"train/{name}": value for name, value in zip(own, means.tolist(), strict=True)}


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

"""The optimiser: which parameters it trains at which rate, and how the rates move over a training."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dml.config import OptimConfig
from dml.encoders import Encoder


def build(encoder: Encoder, loss: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW, Adam or SGD over parameter groups with rates of their own.

    Each group says, beside what torch keeps there, its `part` (backbone, projection or loss) and its `peak` rate.
    Matrices and kernels of the encoder decay; norms, biases, what the backbone itself exempts (timm's no_weight_decay:
    position embeddings, class tokens) and the loss's own parameters do not. The decay of adamw is decoupled from the
    gradient (Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101); that of adam and sgd is added to it.

    Args:
        encoder: all its parameters take part, those of a backbone that is frozen for now included: without a gradient
            the optimiser leaves them alone.
        loss: its own parameters (proxies) make the last group, if it has any.
        config: name, rates and decay.
    """
    exempt = getattr(encoder.backbone, "no_weight_decay", set)
    undecayed = {f"backbone.{name}" for name in exempt()}
    peaks = {"backbone": config.lr, "projection": config.projection_lr or config.lr}
    groups: dict[tuple[str, float], list[nn.Parameter]] = {
        (part, decay): [] for part in peaks for decay in (config.weight_decay, 0.0)
    }
    for name, parameter in encoder.named_parameters():
        part = "backbone" if name.startswith("backbone.") else "projection"
        decays = parameter.ndim > 1 and name not in undecayed
        groups[part, config.weight_decay if decays else 0.0].append(parameter)
    peaks["loss"] = config.loss_lr
    groups["loss", 0.0] = list(loss.parameters())
    found: list[dict[str, Any]] = [
        {"params": parameters, "part": part, "peak": peaks[part], "lr": peaks[part], "weight_decay": decay}
        for (part, decay), parameters in groups.items()
        if parameters
    ]
    if config.name == "sgd":
        return torch.optim.SGD(found, momentum=0.9, fused=True)
    return (torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam)(found, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, progress: float, config: OptimConfig) -> None:
    """Gives every group its rate at a point of training.

    Args:
        optimizer: made by `build`.
        progress: fraction of training done, in [0, 1).
        config: the schedule. The backbone starts where it thaws, everything else at 0.
    """
    for group in optimizer.param_groups:
        start = config.frozen_backbone if group["part"] == "backbone" else 0.0
        group["lr"] = group["peak"] * rate_factor(progress, config, start=start)


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The present rate of each part: {"backbone": 3e-4, "projection": 3e-4, "loss": 1e-2}."""
    return {group["part"]: float(group["lr"]) for group in optimizer.param_groups}


def state(optimizer: torch.optim.Optimizer, encoder: Encoder, loss: nn.Module) -> dict[str, Tensor]:
    """What the optimiser remembers of each parameter: {"encoder.projection.weight/exp_avg": tensor, ...}.

    The tensors are the optimiser's own, not copies. Rates are no part of it: they are a function of progress.

    Args:
        optimizer: made by `build` from this encoder and this loss.
        encoder: whose names parameters go by.
        loss: the same for its own parameters.
    """
    return {
        f"{name}/{slot}": value
        for name, parameter in _named(encoder, loss).items()
        for slot, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore(optimizer: torch.optim.Optimizer, encoder: Encoder, loss: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `state` took.

    Args:
        optimizer: newly made by `build` from this encoder and this loss.
        encoder: as for `state`.
        loss: as for `state`.
        tensors: copied, to where each parameter lies.

    Raises:
        ValueError: a tensor of an unknown parameter, or of another shape than its parameter.
    """
    parameters = _named(encoder, loss)
    for key, value in tensors.items():
        name, _, slot = key.rpartition("/")
        if name not in parameters:
            raise ValueError(f"the optimiser's state is of a parameter {name!r}, which is not trained here")
        parameter = parameters[name]
        if slot == "step":
            optimizer.state[parameter][slot] = value.to(parameter.device, copy=True)
            continue
        if value.shape != parameter.shape:
            raise ValueError(
                f"the optimiser's {slot} of {name} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}"
            )
        # In the parameter's own memory format: a fused step walks through both as they lie in memory.
        optimizer.state[parameter][slot] = torch.empty_like(parameter, requires_grad=False).copy_(value)


def _named(encoder: Encoder, loss: nn.Module) -> dict[str, nn.Parameter]:
    parts = {"encoder": encoder, "loss": loss}
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.named_parameters()}


def rate_factor(progress: float, config: OptimConfig, *, start: float = 0.0) -> float:
    """Share of the peak rate: a linear rise over `warmup`, under the ceiling of the schedule.

        constant   1
        cosine     (1 + cos(pi * t)) / 2, t = (progress - warmup) / (1 - warmup): Loshchilov and Hutter, SGDR, ICLR
                   2017, arXiv 1608.03983, without restarts
        step       step_factor ** (whole times that step_every has passed)

    Args:
        progress: fraction of training done, in [0, 1).
        config: schedule, step_every, step_factor and warmup.
        start: fraction of training at which the rise begins; the rate is 0 before.
    """
    if progress < start:
        return 0.0
    since = progress - start
    # Not 0 at its beginning, or the first step would be lost.
    rise = max(since / config.warmup, 0.01) if since < config.warmup else 1.0
    return rise * _ceiling(progress, config)


def _ceiling(progress: float, config: OptimConfig) -> float:
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "step":
        # 0.3 / 0.1 is a little less than 3 in floating point.
        return config.step_factor ** math.floor(progress / config.step_every + 1e-9)
    if progress < config.warmup:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (progress - config.warmup) / max(1 - config.warmup, 1e-9)))

"""Losses over a `Pairs`: `loss(pairs) -> scalar`. LOSSES names them all; `build` makes one.

A new loss is one file and one line in LOSSES. Each class declares `needs`, the subset of
{"num_classes", "dim"} that its constructor takes before its own options.
"""

import inspect

from dml.config import LossConfig
from dml.losses.contrastive import Contrastive
from dml.losses.loss import Loss
from dml.losses.multi_similarity import MultiSimilarity
from dml.losses.proxy_anchor import ProxyAnchor
from dml.names import unknown

LOSSES: dict[str, type[Loss]] = {
    "contrastive": Contrastive,
    "multi_similarity": MultiSimilarity,
    "proxy_anchor": ProxyAnchor,
}


def build(name: str, **options: float) -> Loss:
    """The loss of this name.

    Args:
        name: a key of LOSSES.
        **options: what the loss `needs` (num_classes, dim) and any of its own options; the others keep their defaults.

    Raises:
        ValueError: unknown name or option (the valid ones are listed), one that is missing, or a value it refuses.
    """
    if name not in LOSSES:
        raise ValueError(unknown("loss", name, LOSSES))
    cls = LOSSES[name]
    valid = inspect.signature(cls).parameters
    for option in options:
        if option not in valid:
            raise ValueError(unknown(f"option of loss {name}", option, valid))
    missing = sorted(cls.needs - set(options))
    if missing:
        raise ValueError(f"loss {name} needs {', '.join(missing)}")
    return cls(**options)


def from_config(config: LossConfig, *, num_classes: int, dim: int) -> Loss:
    """The loss that a config names, given what it needs to know of the data and the encoder.

    Args:
        config: name and options.
        num_classes: C, training classes.
        dim: D, dimension of the embedding.

    Raises:
        ValueError: as `build`.
    """
    if config.name not in LOSSES:
        raise ValueError(unknown("loss", config.name, LOSSES))
    sizes: dict[str, float] = {"num_classes": num_classes, "dim": dim}
    for name in set(config.options) & set(sizes):
        raise ValueError(f"loss.options.{name} is known from the data and the encoder; leave it out")
    return build(config.name, **{name: sizes[name] for name in LOSSES[config.name].needs}, **config.options)

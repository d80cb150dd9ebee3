"""Losses over a `Pairs`: `loss(pairs) -> scalar`. LOSSES names them all; `build` makes one.

A new loss is one file and one line in LOSSES. Each class declares `needs`, the subset of
{"num_classes", "dim"} that its constructor takes before its own options.
"""

import inspect

from dml.config import LossConfig
from dml.losses import outside
from dml.losses.angular import Angular
from dml.losses.arcface import ArcFace, CosFace
from dml.losses.circle import Circle
from dml.losses.contrastive import Contrastive
from dml.losses.contrastive_softmax import NTXent, SupCon
from dml.losses.histogram import Histogram
from dml.losses.lifted import GeneralizedLifted
from dml.losses.loss import Loss, TupleLoss
from dml.losses.margin import Margin
from dml.losses.multi_similarity import MultiSimilarity
from dml.losses.n_pair import NPair
from dml.losses.proxy_anchor import ProxyAnchor
from dml.losses.proxy_nca import ProxyNCA, ProxyNCAPlusPlus
from dml.losses.quadruplet import Quadruplet
from dml.losses.ranked_list import RankedList
from dml.losses.recall_surrogate import RecallSurrogate
from dml.losses.smooth_ap import SmoothAP
from dml.losses.snr import SNRContrastive
from dml.losses.soft_triple import SoftTriple
from dml.losses.softmax import NormalizedSoftmax
from dml.losses.triplet import Triplet
from dml.names import unknown

LOSSES: dict[str, type[Loss]] = {
    "contrastive": Contrastive,
    "multi_similarity": MultiSimilarity,
    "proxy_anchor": ProxyAnchor,
    "proxy_nca": ProxyNCA,
    "proxy_nca_pp": ProxyNCAPlusPlus,
    "normalized_softmax": NormalizedSoftmax,
    "arcface": ArcFace,
    "cosface": CosFace,
    "soft_triple": SoftTriple,
    "generalized_lifted": GeneralizedLifted,
    "ranked_list": RankedList,
    "histogram": Histogram,
    "circle": Circle,
    "nt_xent": NTXent,
    "supcon": SupCon,
    "smooth_ap": SmoothAP,
    "recall_surrogate": RecallSurrogate,
    "triplet": Triplet,
    "quadruplet": Quadruplet,
    "margin": Margin,
    "n_pair": NPair,
    "angular": Angular,
    "snr_contrastive": SNRContrastive,
}


def build(name: str, **options: float | str | None) -> Loss:
    """The loss of this name.

    Args:
        name: a key of LOSSES.
        **options: what the loss `needs` (num_classes, dim) and any of its own options, of a tuple loss also miner and
            rho; the others keep their defaults.

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
        ValueError: as `build`, and as `outside.load` for a name "package.module:Class".
    """
    if ":" in config.name:
        if config.miner is not None or config.rho > 0:
            raise ValueError(f"loss {config.name} is from outside: loss.miner and loss.rho do not reach it")
        return outside.load(config.name, config.options, num_classes=num_classes, dim=dim)
    if config.name not in LOSSES:
        raise ValueError(unknown("loss", config.name, LOSSES))
    cls = LOSSES[config.name]
    sizes = {"num_classes": num_classes, "dim": dim}
    for name in set(config.options) & set(sizes):
        raise ValueError(f"loss.options.{name} is known from the data and the encoder; leave it out")
    for name in set(config.options) & {"miner", "rho"}:
        raise ValueError(f"loss.options.{name} is no option; set loss.{name}")
    mining: dict[str, float | str | None] = {}
    if issubclass(cls, TupleLoss):
        mining = {"miner": config.miner, "rho": config.rho}
    elif config.miner is not None or config.rho > 0:
        takers = ", ".join(name for name, other in LOSSES.items() if issubclass(other, TupleLoss))
        raise ValueError(f"loss {config.name} mines no tuples: loss.miner and loss.rho are for {takers}")
    return build(config.name, **{name: sizes[name] for name in cls.needs}, **config.options, **mining)

"""Losses from outside, by name: "package.module:Class", any nn.Module called with (embeddings, labels).

Nothing else in this project imports by name. `dml.losses.from_config` does, for a training that was asked for on this
machine; a checkpoint or a registered model builds no loss, so it imports nothing.
"""

import importlib
import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dml.losses.loss import Loss
from dml.names import unknown
from dml.pairs import Pairs


class Outside(Loss):
    """A module called with the unit embeddings (N, D) and labels (N,) of all ranks, in full precision.

    It is called whole on every rank, with the same batch, which is right by the gradient rule of dml.gather for any
    loss; its parameters stay equal over ranks, since their gradients do. It is told of no ids: where a batch holds a
    sample twice (batch.small_classes repeat), it takes the two for a positive pair.

    Args:
        module: module(embeddings, labels) -> scalar.
        name: what messages call it.
    """

    needs_positives = False  # not known, so not refused

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module, self.name = module, name

    def forward(self, pairs: Pairs) -> Tensor:
        """The module's value, the same on every rank, a scalar.

        Raises:
            ValueError: it returned something else.
        """
        with torch.autocast(pairs.cols.device.type, enabled=False):
            value = self.module(pairs.cols, pairs.col_labels)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            shown = f"a {value.dtype} tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.80}"
            raise ValueError(f"loss {self.name} must return one floating-point number in a tensor, got {shown}")
        # A constant (no pair to learn from) must stay connected to the graph, or backward has nowhere to start.
        return value.reshape(()) + 0 * pairs.cols.sum()


def load(name: str, options: Mapping[str, float], *, num_classes: int, dim: int) -> Loss:
    """Imports "package.module:Class" and makes one.

    Where its constructor asks for num_classes, or for embedding_size, embedding_dim or dim, without a default, these
    are given unless options set them. Whole numbers among the options are given as int.

    Args:
        name: where the class is. A `Loss` is used as it is, any other nn.Module becomes an `Outside`.
        options: keyword arguments of its constructor.
        num_classes: C, training classes.
        dim: D, dimension of the embedding.

    Raises:
        ValueError: it cannot be imported, is no class of nn.Module, or its constructor refuses the arguments.
    """
    cls = _class(name)
    sizes: dict[str, float] = {"num_classes": num_classes, "embedding_size": dim, "embedding_dim": dim, "dim": dim}
    takes = _parameters(cls)
    given = {key: size for key, size in sizes.items() if key in takes and takes[key].default is inspect.Parameter.empty}
    given |= {key: int(value) if float(value).is_integer() else value for key, value in options.items()}
    try:
        made = cls(**given)
    except Exception as error:  # whatever foreign code may raise
        shown = ", ".join(f"{key}={value:g}" for key, value in given.items())
        raise ValueError(f"loss {name} refuses ({shown}): {error}; it takes {', '.join(takes)}") from error
    return made if isinstance(made, Loss) else Outside(made, name)


def _class(name: str) -> type[nn.Module]:
    path, _, attribute = name.partition(":")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(f"a loss from outside is named package.module:Class, got {name!r}")
    try:
        module = importlib.import_module(path)
    except Exception as error:  # whatever foreign code may raise
        raise ValueError(f"loss {name}: cannot import {path}: {type(error).__name__}: {error}") from error
    found = getattr(module, attribute, None)
    if found is None:
        classes = [key for key, value in vars(module).items() if _is_module(value)]
        raise ValueError(unknown(f"class of {path}", attribute, classes))
    if not _is_module(found):
        raise ValueError(f"loss {name} is no class of torch.nn.Module: {found!r:.80}")
    cls: type[nn.Module] = found
    return cls


def _is_module(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _parameters(cls: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """What the constructor takes by name, its bases' parameters included as far as it hands **kwargs on."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if base is nn.Module:
            break
        if "__init__" not in vars(base):
            continue
        own = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        for parameter in own:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                found.setdefault(parameter.name, parameter)
        if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in own):
            break
    return found

"""What every loss is: a module called with a `Pairs`, and the sum that several of them share."""

from typing import ClassVar

import torch
from torch import Tensor, nn


class Loss(nn.Module):
    """`loss(pairs: Pairs) -> scalar Tensor`, by the gradient rule of dml.gather.

    Attributes:
        needs: which of "num_classes" (C, training classes) and "dim" (D) the constructor takes before its own options.
        stats: after a call, detached scalars worth logging, by name.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.stats: dict[str, Tensor] = {}


def log1p_sum_exp(exponents: Tensor, chosen: Tensor, dim: int) -> Tensor:
    """log(1 + sum of exp over the chosen entries along a dimension), without overflow; 0 where none is chosen."""
    kept = exponents.masked_fill(~chosen, float("-inf"))
    one = torch.zeros_like(kept.select(dim, 0)).unsqueeze(dim)
    return torch.logsumexp(torch.cat([kept, one], dim=dim), dim=dim)

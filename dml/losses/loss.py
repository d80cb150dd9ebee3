"""What every loss is: a module called with a `Pairs`; what every tuple loss is; and the terms that several share."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from dml.miners import MINERS, Miner
from dml.names import unknown
from dml.pairs import Pairs
from dml.tuples import Tuples, rho

# exp(-50) beside 1 is nothing, in float64 too. Exponents are bounded by it: an exp that underflows takes a CPU 10 times
# to 100 times as long as another, and products of the subnormal numbers that come of it take 10 times as long.
NEGLIGIBLE = -50.0


class Loss(nn.Module):
    """`loss(pairs: Pairs) -> scalar Tensor`, by the gradient rule of dml.gather.

    Attributes:
        needs: which of "num_classes" (C, training classes) and "dim" (D) the constructor takes before its own options.
        takes_memory: whether it is called with `pairs.extended`. It then uses row-wise quantities only of similarity,
            positives and negatives, for columns are not rows.
        needs_positives: whether a batch of one sample a class teaches it nothing.
        stats: after a call, detached scalars worth logging, by name, the same names on every rank. Their mean over
            ranks is the figure of the global batch, so a count of this rank's is times the number of ranks.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    takes_memory: ClassVar[bool] = False
    needs_positives: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.stats: dict[str, Tensor] = {}


class TupleLoss(Loss):
    """A loss over mined tuples: a formula over `self.tuples(pairs)`, reduced by `pairs.mean`.

    Args:
        miner: name in dml.miners.MINERS; None for the loss's default.
        rho: probability in [0, 1] with which `dml.tuples.rho` rewrites a tuple.

    Attributes:
        default_miner: the miner that the loss has unless another is asked for; None for all pairs.
        miner: the miner itself; None for all pairs.
    """

    takes_memory = True
    default_miner: ClassVar[str | None]

    def __init__(self, miner: str | None = None, rho: float = 0.0) -> None:
        super().__init__()
        name = self.default_miner if miner is None else miner
        if name is not None and name not in MINERS:
            raise ValueError(unknown("miner", name, MINERS))
        if not 0 <= rho <= 1:
            raise ValueError(f"rho is a probability in [0, 1], got {rho:g}")
        if rho > 0 and name is None:
            raise ValueError(f"rho rewrites mined tuples, but no miner is set; valid: {', '.join(MINERS)}")
        self.miner: Miner | None = None if name is None else MINERS[name]()
        self.rho = rho

    def tuples(self, pairs: Pairs) -> Tuples:
        """This step's tuples of this rank's rows, rho applied."""
        assert self.miner is not None  # a loss over all pairs does not ask
        found = rho(pairs, self.miner(pairs), self.rho)
        self.stats["tuples"] = torch.tensor(float(len(found.anchor) * pairs.world))
        return found


def log1p_sum_exp(exponents: Tensor, chosen: Tensor, dim: int) -> Tensor:
    """log(1 + sum of exp over the chosen entries along a dimension), without overflow; 0 where none is chosen."""
    value: Tensor = _LogSumExp.apply(exponents, chosen, dim, True)
    return value


def log_sum_exp(exponents: Tensor, chosen: Tensor, dim: int) -> Tensor:
    """Log of the sum of exp over the chosen entries along a dimension, without overflow.

    Where none is chosen it is the lowest finite number: through an infinite one, gradients would be NaN even times 0.
    """
    value: Tensor = _LogSumExp.apply(exponents, chosen, dim, False)
    return value


class _LogSumExp(torch.autograd.Function):
    """In one buffer, that holds the softmax in the end, its own gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, exponents: Tensor, chosen: Tensor, dim: int, and_one: bool) -> Tensor:
        limits, idle = torch.finfo(exponents.dtype), ~chosen
        softmax = exponents.masked_fill(idle, limits.min)
        peak = softmax.amax(dim, keepdim=True)
        if and_one:
            peak.clamp_(min=0)
        softmax.sub_(peak).clamp_(min=NEGLIGIBLE).exp_().masked_fill_(idle, 0)
        total = softmax.sum(dim, keepdim=True)
        if and_one:
            total += (-peak).exp()
        ctx.save_for_backward(softmax.div_(total.clamp_(min=limits.tiny)))
        ctx.dim = dim  # type: ignore[attr-defined]
        return total.log_().add_(peak).squeeze(dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (softmax,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return softmax * grad.unsqueeze(ctx.dim), None, None, None  # type: ignore[attr-defined]


def log1p_sum_exp_by(anchor_T: Tensor, exponents_T: Tensor, rows: int) -> Tensor:
    """log(1 + sum of exp over the anchor's tuples) for each of B rows, (B,), without overflow; 0 where it has none.

    Args:
        anchor_T: int64 (T,), in 0..rows-1.
        exponents_T: floating (T,).
        rows: B.
    """
    zeros_B = exponents_T.new_zeros(rows)
    peak_B = zeros_B.scatter_reduce(0, anchor_T, exponents_T.detach(), "amax")
    total_B = (-peak_B).exp().index_add(0, anchor_T, (exponents_T - peak_B[anchor_T]).exp())
    return total_B.log() + peak_B


def mean_of_violations(pairs: Pairs, excess: Tensor) -> Tensor:
    """The mean over all ranks of the terms above 0, a scalar; 0 if there is none. A collective, as `Pairs.mean` is."""
    violated = excess > 0
    return pairs.mean(excess.masked_fill(~violated, 0).sum(), violated.sum())


def euclidean(similarity: Tensor) -> Tensor:
    """Euclidean distance sqrt(2 - 2 s) of unit vectors from their cosine similarity; of the same shape.

    Below 1e-3 it is rounding noise of float32 similarities, and the root's slope would amplify it: 0 with gradient 0.
    """
    squared = 2 - 2 * similarity
    return squared.clamp(min=1e-6).sqrt().masked_fill(squared < 1e-6, 0)


def check_margin(name: str, margin: float, low: float = 0.0, high: float = 2.0) -> None:
    """Raises ValueError unless a margin lies in a range; by default that of distances of unit vectors."""
    if not low <= margin <= high:
        raise ValueError(f"{name} is in [{low:g}, {high:g}], got {margin:g}")

"""Gathering embeddings over ranks so that gradients equal those of one process.

The one gradient rule. Rank r holds local embeddings e_r = f(theta, x_r), every rank sees all of them, and rank q
computes loss_q(e_1, ..., e_W). The objective is their mean,

    L = 1/W * sum_q loss_q        dL/dtheta = 1/W * sum_r (sum_q dloss_q/de_r) * de_r/dtheta

Three factors, three places: the backward of `gather` gives rank r the inner sum over q (an all-reduce, then its own
rows); rank r's backward multiplies by de_r/dtheta; DDP averages the result over r, which is the 1/W. A loss that is a
mean over the global batch therefore returns W * local_sum / global_count (`Pairs.mean`), whose mean over ranks is the
global mean. A loss that is no sum over rows is computed whole on every rank, and is its own mean.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

Group = dist.ProcessGroup


def world(group: Group | None) -> int:
    """Ranks in a group; 1 for None, which means work on one rank only."""
    return 1 if group is None else dist.get_world_size(group)


def rank(group: Group | None) -> int:
    """This process's rank in a group; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


def default_group() -> Group | None:
    """The group of all ranks, or None when torch.distributed is not initialised or has one rank."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed since another rank is gone: the fault is not this rank's, and may not come again."""
    if isinstance(error, dist.DistError):
        return True
    # gloo raises bare RuntimeErrors; the places in its source, and the system's words for a broken connection.
    signs = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def row_counts(rows: int, group: Group | None, device: torch.device) -> list[int]:
    """Rows that each rank holds; one small collective.

    Args:
        rows: rows of this rank, 0 or more.
        group: ranks that take part; None for this one alone.
        device: where the collective's tensor lies (the backend's device).
    """
    if group is None:
        return [rows]
    counts = torch.zeros(world(group), dtype=torch.int64, device=device)
    counts[rank(group)] = rows
    dist.all_reduce(counts, group=group)
    return [int(count) for count in counts.tolist()]


def gather(rows_BX: Tensor, counts: list[int], group: Group | None) -> Tensor:
    """Rows of all ranks, in rank order: (B_r, ...) -> (N, ...), N = sum of counts. Differentiable by the rule above.

    Args:
        rows_BX: this rank's rows, of any dtype; B_r may differ between ranks.
        counts: `row_counts` of the group.
        group: ranks that take part; None returns the rows as they are.
    """
    if group is None:
        return rows_BX
    gathered: Tensor = _Gather.apply(rows_BX, counts, group)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows_BX: Tensor, counts: list[int], group: Group) -> Tensor:
        me = rank(group)
        ctx.start, ctx.stop, ctx.group = sum(counts[:me]), sum(counts[: me + 1]), group  # type: ignore[attr-defined]
        # Every rank's part has the same shape in the collective: gloo and NCCL both ask for it.
        padded = rows_BX.new_zeros((max(counts), *rows_BX.shape[1:]))
        padded[: len(rows_BX)] = rows_BX
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)  # type: ignore[attr-defined]
        return total[ctx.start : ctx.stop], None, None  # type: ignore[attr-defined]


def sum_over_ranks(value: Tensor, group: Group | None) -> Tensor:
    """The sum of a detached tensor over ranks, on every rank; itself for None."""
    if group is None:
        return value
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def average_gradients(module: nn.Module, group: Group | None) -> None:
    """Averages the gradients of a module that DDP does not wrap (a loss's proxies) over ranks, as DDP does.

    A rank whose batch gave a parameter no gradient counts as zero.
    """
    if group is None:
        return
    for parameter in module.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad /= world(group)


def broadcast(tensors: Iterable[Tensor], group: Group | None) -> None:
    """Rank 0's values of these tensors on every rank, in place; every rank gives as many, in the same order."""
    if group is None:
        return
    for tensor in tensors:
        dist.broadcast(tensor.detach(), src=dist.get_global_rank(group, 0), group=group)


def broadcast_floats(values: list[float], group: Group | None, device: torch.device) -> list[float]:
    """Rank 0's numbers on every rank, in float64, so that all ranks decide alike."""
    if group is None:
        return values
    shared = torch.tensor(values, dtype=torch.float64, device=device)
    broadcast([shared], group)
    return [float(value) for value in shared.tolist()]

"""Ranks of a row's positives, smooth enough to be differentiated: what Smooth-AP and the Recall@k surrogate share.

For row a and its positive i, with the sigmoid of (s_aj - s_ai) / temperature in place of "j ranks before i",

    above_pos = sum over the other positives j of sigmoid((s_aj - s_ai) / temperature)
    above_neg = sum over the negatives j       of sigmoid((s_aj - s_ai) / temperature)

so that 1 + above_pos is the rank among the positives and 1 + above_pos + above_neg the rank among all. Only positives
are ranked, so B rows with K positives among N columns cost O(B K N) sigmoids, never O(B N N).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from dml.losses.loss import NEGLIGIBLE
from dml.pairs import Pairs

# Sigmoids of a block: as many as the cache of a CPU's core holds; on a GPU memory is the limit and a block is a launch.
CACHED, RESIDENT = 1 << 17, 1 << 25


class SoftRanks(NamedTuple):
    """Soft counts of what ranks before each positive of each row.

    Attributes:
        above_pos_BK: other positives before this one; K is the largest number of positives of a row.
        above_neg_BK: negatives before it.
        valid_BK: bool; a row with fewer positives has places that are none.
    """

    above_pos_BK: Tensor
    above_neg_BK: Tensor
    valid_BK: Tensor


def soft_ranks(pairs: Pairs, temperature: float) -> SoftRanks:
    """Ranks each row's positives among its positives and negatives.

    Args:
        pairs: rows may differ in their number of positives.
        temperature: of the sigmoid over differences of cosine similarity, > 0.
    """
    s, infinity = pairs.similarity, float("inf")
    columns_BK, valid_BK = _columns(pairs.positives)
    own_BK = s.gather(1, columns_BK)
    above_pos_BK = _count_above(own_BK.masked_fill(~valid_BK, -infinity), own_BK, temperature)
    above_neg_BK = _count_above(s.masked_fill(~pairs.negatives, -infinity), own_BK, temperature)
    # Compared with itself a positive counts sigmoid(0).
    return SoftRanks(above_pos_BK - 0.5, above_neg_BK, valid_BK)


def _columns(mask_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of the true entries of each row, int64 (B, K) padded with 0, and which of them are no padding."""
    counts_B = mask_BN.sum(1)
    rows_T, columns_T = mask_BN.nonzero(as_tuple=True)
    places_T = torch.arange(len(rows_T), device=mask_BN.device) - (counts_B.cumsum(0) - counts_B)[rows_T]
    largest = max(counts_B.tolist(), default=0)
    columns_BK = columns_T.new_zeros(len(mask_BN), largest)
    columns_BK[rows_T, places_T] = columns_T
    return columns_BK, torch.arange(largest, device=mask_BN.device) < counts_B[:, None]


def _count_above(scores_BM: Tensor, levels_BK: Tensor, temperature: float) -> Tensor:
    """Sum over M of sigmoid((score - level) / temperature), (B, K); a score of -inf counts 2e-22."""
    above_BK: Tensor = _CountAbove.apply(scores_BM, levels_BK, temperature)
    return above_BK


class _CountAbove(torch.autograd.Function):
    """Keeps its inputs only: the B x K x M sigmoids exist one block of rows at a time, in backward once more."""

    @staticmethod
    def forward(ctx: FunctionCtx, scores_BM: Tensor, levels_BK: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(scores_BM, levels_BK)
        ctx.temperature = temperature  # type: ignore[attr-defined]
        above_BK = torch.empty_like(levels_BK)
        for rows in _blocks(scores_BM, levels_BK):
            torch.sum(_sigmoids(scores_BM[rows], levels_BK[rows], temperature), dim=2, out=above_BK[rows])
        return above_BK

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_BK: Tensor) -> tuple[Tensor, Tensor, None]:
        scores_BM, levels_BK = ctx.saved_tensors  # type: ignore[attr-defined]
        temperature: float = ctx.temperature  # type: ignore[attr-defined]
        grad_BK = grad_BK.masked_fill(grad_BK.abs() < 1e-15, 0) / temperature
        to_scores_BM, to_levels_BK = torch.empty_like(scores_BM), torch.empty_like(levels_BK)
        for rows in _blocks(scores_BM, levels_BK):
            share_bKM = _sigmoids(scores_BM[rows], levels_BK[rows], temperature)
            share_bKM.addcmul_(share_bKM, share_bKM, value=-1)  # sigmoid' = sigmoid - sigmoid^2
            share_bKM.mul_(grad_BK[rows, :, None])
            torch.sum(share_bKM, dim=1, out=to_scores_BM[rows])
            torch.sum(share_bKM, dim=2, out=to_levels_BK[rows])
        return to_scores_BM, to_levels_BK.neg_(), None


def _sigmoids(scores_bM: Tensor, levels_bK: Tensor, temperature: float) -> Tensor:
    # Bounded, so that no product of small numbers is subnormal: those take a CPU ten times as long.
    return (scores_bM[:, None, :] - levels_bK[:, :, None]).div_(temperature).clamp_(min=NEGLIGIBLE).sigmoid_()


def _blocks(scores_BM: Tensor, levels_BK: Tensor) -> Iterator[slice]:
    at_once = CACHED if scores_BM.device.type == "cpu" else RESIDENT
    rows = max(1, at_once // max(1, scores_BM.shape[1] * levels_BK.shape[1]))
    return (slice(start, start + rows) for start in range(0, len(scores_BM), rows))

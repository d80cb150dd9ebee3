"""Histogram loss."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from dml.losses.loss import Loss
from dml.pairs import Pairs


class Histogram(Loss):
    """The probability that a random positive pair is less similar than a random negative pair, by histograms.

    Nodes t_0 = -1 ... t_bins = 1 are equally spaced. A pair of similarity s between two nodes adds to both, to
    each the more the nearer it is, 1 in sum; h_pos and h_neg are so the histograms of the positive and of the negative
    pairs, normalised to 1,

        sum over nodes r of h_neg(r) * sum over nodes q <= r of h_pos(q)

    and 0 where one kind of pair is missing. It is no sum over rows, so every rank computes it over the gathered batch.
    pytorch-metric-learning has the same (its default is 100 bins), but fails at a similarity of exactly 1.

    Ustinova and Lempitsky, Learning Deep Embeddings with Histogram Loss, NIPS 2016, arXiv 1611.00822.

    Args:
        bins: intervals between -1 and 1, a whole number >= 1.
    """

    def __init__(self, bins: float = 65) -> None:
        super().__init__()
        if bins < 1 or bins != int(bins):
            raise ValueError(f"bins must be a whole number of at least 1, got {bins:g}")
        self.bins = int(bins)

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch, the same on every rank, a scalar."""
        whole = pairs.whole
        # Kinds: 1 positive, 2 negative, 0 a sample with itself, which goes to a histogram that nobody reads.
        kind_NN = torch.add(whole.positives.view(torch.int8), whole.negatives.view(torch.int8), alpha=2)
        loss: Tensor = _Overlap.apply(whole.similarity, kind_NN.long(), self.bins)
        return loss


class _Overlap(torch.autograd.Function):
    """The overlap is piecewise linear in every similarity, so its gradient is a table over intervals."""

    @staticmethod
    def forward(ctx: FunctionCtx, s_NN: Tensor, kind_NN: Tensor, bins: int) -> Tensor:
        place_NN = (s_NN + 1) * (bins / 2)
        left_NN = place_NN.long().clamp_(0, bins - 1)
        cell = (kind_NN * bins + left_NN).view(-1)
        count = torch.bincount(cell, minlength=3 * bins).view(3, bins)[1:].to(s_NN.dtype)
        upper = torch.bincount(cell, (place_NN - left_NN).view(-1), 3 * bins).view(3, bins)[1:].to(s_NN.dtype)
        nodes = torch.zeros(2, bins + 1, dtype=s_NN.dtype, device=s_NN.device)
        nodes[:, :-1] += count - upper
        nodes[:, 1:] += upper
        totals = count.sum(1).clamp(min=1)
        h_pos, h_neg = nodes / totals[:, None]
        # Raising s moves weight from a node to the next: a positive leaves h_neg(node), a negative gains h_pos(next).
        slope = torch.stack([torch.zeros_like(h_pos[1:]), -h_neg[:-1] / totals[0], h_pos[1:] / totals[1]]) * (bins / 2)
        ctx.save_for_backward(cell, slope.view(-1))
        ctx.shape = s_NN.shape  # type: ignore[attr-defined]
        overlap: Tensor = (h_neg * h_pos.cumsum(0)).sum()
        return overlap

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        cell, slope = ctx.saved_tensors  # type: ignore[attr-defined]
        return (grad * slope)[cell].view(ctx.shape), None, None  # type: ignore[attr-defined]

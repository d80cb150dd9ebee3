"""The threshold-consistent margin (TCM), a regulariser added to any loss."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dml.losses.loss import Loss
from dml.pairs import Pairs


class TCM(Loss):
    """Pulls hard positives up to one similarity and pushes hard negatives down to another, the same for every class.

        weight_pos * mean of (margin_pos - s) over positive pairs with s <= margin_pos
      + weight_neg * mean of (s - margin_neg) over negative pairs with s >= margin_neg

    s is the cosine similarity. The means run over the hard pairs of the global batch; a term without one is 0. It is
    called as a loss is and shares its similarity matrix: `loss(pairs) + weight * tcm(pairs)`.

    Zhang et al., Threshold-Consistent Margin Loss for Open-World Deep Metric Learning, ICLR 2024, arXiv 2307.04047.

    Args:
        margin_pos: cosine similarity in [-1, 1], not below margin_neg.
        margin_neg: cosine similarity in [-1, 1].
        weight_pos: factor on the positive term, >= 0.
        weight_neg: factor on the negative term, >= 0.

    Attributes:
        stats: after a call, detached scalars, whose mean over ranks is: tcm/positive and tcm/negative (the two terms,
            before their factors), tcm/hard_positives and tcm/hard_negatives (share of the pairs that are hard, in
            [0, 1]).
    """

    def __init__(
        self, margin_pos: float = 0.9, margin_neg: float = 0.5, weight_pos: float = 1.0, weight_neg: float = 1.0
    ) -> None:
        super().__init__()
        for name, margin in (("margin_pos", margin_pos), ("margin_neg", margin_neg)):
            if not -1 <= margin <= 1:
                raise ValueError(f"{name} is a cosine similarity in [-1, 1], got {margin:g}")
        if margin_neg > margin_pos:
            raise ValueError(f"margin_neg ({margin_neg:g}) must not exceed margin_pos ({margin_pos:g})")
        if weight_pos < 0 or weight_neg < 0:
            raise ValueError(f"weights must be at least 0, got {weight_pos:g} and {weight_neg:g}")
        self.margin_pos, self.margin_neg = margin_pos, margin_neg
        self.weight_pos, self.weight_neg = weight_pos, weight_neg

    def forward(self, pairs: Pairs) -> Tensor:
        """The regulariser over the global batch by the gradient rule, a scalar."""
        s = pairs.similarity
        with torch.no_grad():
            hard, pull, positive = self._term("positive", pairs, -self.weight_pos)
            others, push, negative = self._term("negative", pairs, self.weight_neg)
            slope = hard.mul_(pull).addcmul_(others, push)
            value = positive + negative
        found: Tensor = _Sloped.apply(s, slope, value)
        return found

    def _term(self, name: str, pairs: Pairs, factor: float) -> tuple[Tensor, Tensor, Tensor]:
        """The hard pairs as ones of a float (B, N), the slope of each, and factor * their mean (s - margin).

        Floats throughout: a comparison that gives a bool takes several times as long, and so does a bool made a float
        other than by way of int8. At batches of a hundred each of these calls counts.
        """
        mask, compare, margin = (
            (pairs.positives, torch.le, self.margin_pos)
            if name == "positive"
            else (pairs.negatives, torch.ge, self.margin_neg)
        )
        s = pairs.similarity.detach()
        kind = mask.view(torch.int8).to(s.dtype)
        hard = compare(s, margin, out=torch.empty_like(s)).mul_(kind)
        count = hard.sum()
        weight, share = pairs.weight(torch.stack([count, kind.sum()]))
        mean = torch.dot(hard.view(-1), s.view(-1)).sub_(count, alpha=margin).mul_(weight)
        self.stats[f"tcm/{name}"] = mean.abs()
        self.stats[f"tcm/hard_{name}s"] = count * share
        return hard, weight * factor, mean * factor


class _Sloped(torch.autograd.Function):
    """A value with a slope that is known: TCM is linear in s once it is settled which pairs are hard.

    Autograd would derive the same in a dozen passes over (B, N) that each take new memory.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, slope: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * grads[0], None, None

"""Ranked list loss."""

import torch
from torch import Tensor

from dml.losses.loss import NEGLIGIBLE, Loss, check_margin, euclidean
from dml.pairs import Pairs


class RankedList(Loss):
    """Positives of a row within one distance, negatives beyond another, the hard ones with more weight.

    With d = sqrt(2 - 2 s), the Euclidean distance of unit vectors, per row

        (1 - balance) * sum_pos w x / sum_pos w   with x = d - (alpha - margin), w = exp(heat_pos x)
      +      balance  * sum_neg w x / sum_neg w   with x = alpha - d,            w = exp(heat_neg x)

    over the pairs with x > 0; a sum without any is 0. Averaged over all rows of the global batch. The weights w are
    constants of the gradient, so that how hard a pair is pulled is its weight alone, as the paper derives it;
    pytorch-metric-learning differentiates them too (same value, another gradient unless the heats are 0) and adds 1e-5
    a column to their sum.

    Wang et al., Ranked List Loss for Deep Metric Learning, CVPR 2019, arXiv 1903.03238. Its L_P + lambda L_N with
    lambda = 1 is twice ours with balance = 0.5.

    Args:
        alpha: distance in [0, 2] beyond which negatives are let be.
        margin: how much nearer than alpha positives have to be, in [0, alpha].
        heat_neg: the paper's T_n, >= 0; 0 weighs all violating negatives alike.
        heat_pos: T_p, >= 0; 0 weighs all violating positives alike, as the paper does.
        balance: share of the negative term, in [0, 1].
    """

    takes_memory = True

    def __init__(
        self,
        alpha: float = 1.2,
        margin: float = 0.4,
        heat_neg: float = 10.0,
        heat_pos: float = 0.0,
        balance: float = 0.5,
    ) -> None:
        super().__init__()
        check_margin("alpha", alpha)
        check_margin("margin", margin, high=alpha)
        if heat_neg < 0 or heat_pos < 0:
            raise ValueError(f"heat_neg and heat_pos must be at least 0, got {heat_neg:g} and {heat_pos:g}")
        check_margin("balance", balance, high=1.0)
        self.alpha, self.margin = alpha, margin
        self.heat_neg, self.heat_pos, self.balance = heat_neg, heat_pos, balance

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch by the gradient rule, a scalar."""
        d = euclidean(pairs.similarity)
        pull = _weighted_excess(d - (self.alpha - self.margin), pairs.positives, self.heat_pos)
        push = _weighted_excess(self.alpha - d, pairs.negatives, self.heat_neg)
        return pairs.mean((1 - self.balance) * pull + self.balance * push, len(d))


def _weighted_excess(excess_BN: Tensor, chosen_BN: Tensor, heat: float) -> Tensor:
    """Sum over rows of the mean of the chosen entries above 0, weighted by exp(heat * excess)."""
    with torch.no_grad():
        idle_BN = ~chosen_BN | (excess_BN <= 0)
        weights_BN = (heat * excess_BN).masked_fill_(idle_BN, 0)
        weights_BN.sub_(weights_BN.amax(1, keepdim=True)).clamp_(min=NEGLIGIBLE).exp_().masked_fill_(idle_BN, 0)
        weights_BN /= weights_BN.sum(1, keepdim=True).clamp_(min=1)  # at least 1 but for a row without any
    return (weights_BN * excess_BN).sum()

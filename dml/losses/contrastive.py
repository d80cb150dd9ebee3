"""Contrastive loss."""

from torch import Tensor

from dml.losses.loss import TupleLoss, check_margin, euclidean, mean_of_violations
from dml.pairs import Pairs


class Contrastive(TupleLoss):
    """Positives pulled within one distance, negatives pushed beyond another.

    With d = sqrt(2 - 2 s), the Euclidean distance of unit vectors,

        mean of (d - margin_pos) over positive pairs with d > margin_pos
      + mean of (margin_neg - d) over negative pairs with d < margin_neg

    over all pairs of the global batch or, with a miner, over the pairs (a, p) and (a, n) of its tuples; a term without
    such a pair is 0. The distances enter linearly and means run over the pairs that violate their margin; the original
    squares them and averages over all.

    Hadsell, Chopra and LeCun, Dimensionality Reduction by Learning an Invariant Mapping, CVPR 2006.

    Args:
        margin_pos: distance in [0, 2] within which positives are let be.
        margin_neg: distance in [0, 2] beyond which negatives are let be.
        miner: None takes all pairs.
        rho: as TupleLoss; needs a miner.
    """

    default_miner = None

    def __init__(
        self, margin_pos: float = 0.0, margin_neg: float = 1.0, *, miner: str | None = None, rho: float = 0.0
    ) -> None:
        super().__init__(miner, rho)
        check_margin("margin_pos", margin_pos)
        check_margin("margin_neg", margin_neg)
        self.margin_pos, self.margin_neg = margin_pos, margin_neg

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch by the gradient rule, a scalar."""
        if self.miner is None:
            distance = euclidean(pairs.similarity)
            pull = (distance - self.margin_pos).masked_fill(~pairs.positives, 0)
            push = (self.margin_neg - distance).masked_fill(~pairs.negatives, 0)
        else:
            anchor, positive, negative = self.tuples(pairs)
            pull = euclidean(pairs.similarity[anchor, positive]) - self.margin_pos
            push = self.margin_neg - euclidean(pairs.similarity[anchor, negative])
        return mean_of_violations(pairs, pull) + mean_of_violations(pairs, push)

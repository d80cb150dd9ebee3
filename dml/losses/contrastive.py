"""Contrastive loss."""

from torch import Tensor

from dml.losses.loss import Loss
from dml.pairs import Pairs


class Contrastive(Loss):
    """Positives pulled within one distance, negatives pushed beyond another.

    With d = sqrt(2 - 2 s), the Euclidean distance of unit vectors,

        mean of (d - margin_pos) over positive pairs with d > margin_pos
      + mean of (margin_neg - d) over negative pairs with d < margin_neg

    over the pairs of the global batch; a term without such a pair is 0. The distances enter linearly and means run over
    the pairs that violate their margin; the original squares them and averages over all.

    Hadsell, Chopra and LeCun, Dimensionality Reduction by Learning an Invariant Mapping, CVPR 2006.

    Args:
        margin_pos: distance in [0, 2] within which positives are let be.
        margin_neg: distance in [0, 2] beyond which negatives are let be.
    """

    def __init__(self, margin_pos: float = 0.0, margin_neg: float = 1.0) -> None:
        super().__init__()
        for name, margin in (("margin_pos", margin_pos), ("margin_neg", margin_neg)):
            if not 0 <= margin <= 2:
                raise ValueError(f"{name} is a distance of unit vectors in [0, 2], got {margin:g}")
        self.margin_pos, self.margin_neg = margin_pos, margin_neg

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch by the gradient rule, a scalar."""
        # Below 1e-3 a distance is rounding noise of float32 similarities, and the root's slope would amplify it.
        distance = (2 - 2 * pairs.similarity).clamp(min=1e-6).sqrt()
        total = distance.new_zeros(())
        for excess, mask in (
            (distance - self.margin_pos, pairs.positives),
            (self.margin_neg - distance, pairs.negatives),
        ):
            active = mask & (excess > 0)
            total = total + pairs.mean(excess.masked_fill(~active, 0).sum(), active.sum())
        return total

"""Triplet loss."""

from torch import Tensor

from dml.losses.loss import TupleLoss, check_margin, euclidean
from dml.pairs import Pairs


class Triplet(TupleLoss):
    """A positive nearer than a negative by a margin.

        mean over tuples (a, p, n) of max(0, d(a, p) - d(a, n) + margin)

    d = sqrt(2 - 2 s) is the Euclidean distance of unit vectors; FaceNet squares it. The mean runs over all mined
    tuples, also those that satisfy their margin.

    Schroff, Kalenichenko and Philbin, FaceNet, CVPR 2015, arXiv 1503.03832; margin of Roth et al., ICML 2020, arXiv
    2002.08473.

    Args:
        margin: a distance in [0, 2].
        miner: semihard unless another is named.
        rho: as TupleLoss.
    """

    default_miner = "semihard"

    def __init__(self, margin: float = 0.2, *, miner: str | None = None, rho: float = 0.0) -> None:
        super().__init__(miner, rho)
        check_margin("margin", margin)
        self.margin = margin

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch by the gradient rule, a scalar."""
        anchor, positive, negative = self.tuples(pairs)
        near, far = euclidean(pairs.similarity[anchor, positive]), euclidean(pairs.similarity[anchor, negative])
        return pairs.mean((near - far + self.margin).clamp(min=0).sum(), len(anchor))

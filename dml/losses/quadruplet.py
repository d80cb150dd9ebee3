"""Quadruplet loss."""

from torch import Tensor

from dml.losses.loss import TupleLoss, check_margin, euclidean
from dml.pairs import Pairs
from dml.tuples import second_negative


class Quadruplet(TupleLoss):
    """A positive nearer than a negative, and nearer than two strangers are to each other.

        mean over tuples (a, p, n) of   max(0, d(a, p) - d(a, n) + margin)
                                      + max(0, d(a, p) - d(n, m) + margin_second)

    d = sqrt(2 - 2 s) is the Euclidean distance of unit vectors; the paper squares it. m is drawn uniformly from the
    classes that are neither a's nor n's; where there is none, its term is 0.

    Chen, Chen, Zhang and Huang, Beyond Triplet Loss: A Deep Quadruplet Network for Person Re-Identification, CVPR 2017,
    arXiv 1704.01719; margins of Roth et al., ICML 2020, arXiv 2002.08473.

    Args:
        margin: of the triplet's term, a distance in [0, 2].
        margin_second: of the term with the second negative, a distance in [0, 2].
        miner: distance_weighted unless another is named.
        rho: as TupleLoss.
    """

    default_miner = "distance_weighted"

    def __init__(
        self, margin: float = 0.2, margin_second: float = 0.2, *, miner: str | None = None, rho: float = 0.0
    ) -> None:
        super().__init__(miner, rho)
        check_margin("margin", margin)
        check_margin("margin_second", margin_second)
        self.margin, self.margin_second = margin, margin_second

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch by the gradient rule, a scalar."""
        tuples = self.tuples(pairs)
        anchor, positive, negative = tuples
        second, exists = second_negative(pairs, tuples)
        near, far = euclidean(pairs.similarity[anchor, positive]), euclidean(pairs.similarity[anchor, negative])
        apart = euclidean(pairs.similarity_of(negative, second))
        terms = (near - far + self.margin).clamp(min=0) + (near - apart + self.margin_second).clamp(min=0) * exists
        return pairs.mean(terms.sum(), len(anchor))

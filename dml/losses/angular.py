"""Angular loss."""

import math

from torch import Tensor

from dml.losses.loss import TupleLoss, log1p_sum_exp_by
from dml.pairs import Pairs


class Angular(TupleLoss):
    """The angle at the negative of the triangle (anchor, positive, negative) held below a bound.

        mean over anchors a with a tuple of log(1 + sum over its tuples (a, p, n) of exp(f))
        f = 4 tan(angle)^2 (s(a, n) + s(p, n)) - 2 (1 + tan(angle)^2) s(a, p)

    s is the cosine similarity. The paper adds it to the N-pair loss; here it stands alone.

    Wang, Zhou, Wen, Liu and Lin, Deep Metric Learning with Angular Loss, ICCV 2017, arXiv 1708.01682; 45 degrees as in
    Roth et al., ICML 2020, arXiv 2002.08473.

    Args:
        angle: bound in degrees, above 0 and below 90.
        miner: n_pair unless another is named.
        rho: as TupleLoss.
    """

    default_miner = "n_pair"

    def __init__(self, angle: float = 45.0, *, miner: str | None = None, rho: float = 0.0) -> None:
        super().__init__(miner, rho)
        if not 0 < angle < 90:
            raise ValueError(f"angle is in degrees, above 0 and below 90, got {angle:g}")
        self.squared_tangent = math.tan(math.radians(angle)) ** 2

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch by the gradient rule, a scalar."""
        anchor, positive, negative = self.tuples(pairs)
        s, squared = pairs.similarity, self.squared_tangent
        to_negative = s[anchor, negative] + pairs.similarity_of(positive, negative)
        exponents = 4 * squared * to_negative - 2 * (1 + squared) * s[anchor, positive]
        return pairs.mean(log1p_sum_exp_by(anchor, exponents, len(s)).sum(), len(anchor.unique_consecutive()))

"""N-pair loss."""

from torch import Tensor

from dml.losses.loss import TupleLoss, log1p_sum_exp_by
from dml.pairs import Pairs


class NPair(TupleLoss):
    """One positive against a negative of every other class at once.

        mean over anchors a with a tuple of log(1 + sum over its tuples (a, p, n) of exp(scale * (s(a, n) - s(a, p))))

    s is the cosine similarity. The paper's embeddings have any length, held back by an l2 term (0.005 in Roth et al.):
    unit norm makes that term a constant and it is left out, and `scale` stands for the length that is gone.

    Sohn, Improved Deep Metric Learning with Multi-class N-pair Loss Objective, NeurIPS 2016.

    Args:
        scale: factor on the similarities, > 0; 1 leaves the paper's formula as it is.
        miner: n_pair unless another is named.
        rho: as TupleLoss.
    """

    default_miner = "n_pair"

    def __init__(self, scale: float = 1.0, *, miner: str | None = None, rho: float = 0.0) -> None:
        super().__init__(miner, rho)
        if scale <= 0:
            raise ValueError(f"scale must be above 0, got {scale:g}")
        self.scale = scale

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch by the gradient rule, a scalar."""
        anchor, positive, negative = self.tuples(pairs)
        s = pairs.similarity
        terms_B = log1p_sum_exp_by(anchor, self.scale * (s[anchor, negative] - s[anchor, positive]), len(s))
        return pairs.mean(terms_B.sum(), len(anchor.unique_consecutive()))

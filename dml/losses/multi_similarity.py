"""Multi-similarity loss."""

import torch
from torch import Tensor

from dml.losses.loss import Loss, log1p_sum_exp
from dml.pairs import Pairs


class MultiSimilarity(Loss):
    """Pairs weighted by their own and by their neighbours' similarities.

    Per row i, over its mined positives and negatives with cosine similarity s:

        1/alpha * log(1 + sum_pos exp(-alpha (s - base))) + 1/beta * log(1 + sum_neg exp(beta (s - base)))

    averaged over all rows of the global batch. A positive is mined when s < max over negatives + epsilon, a negative
    when s > min over positives - epsilon; a row without either kind adds 0.

    Wang et al., Multi-Similarity Loss with General Pair Weighting, CVPR 2019, arXiv 1904.06627.

    Args:
        alpha: sharpness over positives, > 0.
        beta: sharpness over negatives, > 0.
        base: lambda of the paper, the similarity that both terms turn around, in [-1, 1].
        epsilon: slack of the mining, >= 0.
    """

    takes_memory = True

    def __init__(self, alpha: float = 2.0, beta: float = 40.0, base: float = 0.5, epsilon: float = 0.1) -> None:
        super().__init__()
        if alpha <= 0 or beta <= 0:
            raise ValueError(f"alpha and beta must be above 0, got {alpha:g} and {beta:g}")
        if not -1 <= base <= 1:
            raise ValueError(f"base is a cosine similarity in [-1, 1], got {base:g}")
        if epsilon < 0:
            raise ValueError(f"epsilon must be at least 0, got {epsilon:g}")
        self.alpha, self.beta, self.base, self.epsilon = alpha, beta, base, epsilon

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch by the gradient rule, a scalar."""
        s, infinity = pairs.similarity, float("inf")
        with torch.no_grad():
            hardest_negative = s.masked_fill(~pairs.negatives, -infinity).amax(1, keepdim=True)
            hardest_positive = s.masked_fill(~pairs.positives, infinity).amin(1, keepdim=True)
            positives = pairs.positives & (s < hardest_negative + self.epsilon)
            negatives = pairs.negatives & (s > hardest_positive - self.epsilon)
        pull = log1p_sum_exp(-self.alpha * (s - self.base), positives, dim=1) / self.alpha
        push = log1p_sum_exp(self.beta * (s - self.base), negatives, dim=1) / self.beta
        return pairs.mean((pull + push).sum(), len(s))

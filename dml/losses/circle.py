"""Circle loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dml.losses.loss import Loss, check_margin, log_sum_exp
from dml.pairs import Pairs


class Circle(Loss):
    """Each similarity pulled towards its optimum the harder the farther it is from it.

    Per row with cosine similarities s,

        log(1 + sum_pos exp(-gamma a_pos (s - (1 - margin))) * sum_neg exp(gamma a_neg (s - margin)))
        a_pos = max(0, 1 + margin - s),  a_neg = max(0, s + margin)

    averaged over the rows of the global batch that have both a positive and a negative. The factors a are constants of
    the gradient, as in the paper.

    Sun et al., Circle Loss: A Unified Perspective of Pair Similarity Optimization, CVPR 2020, arXiv 2002.10857;
    defaults are those of its fine-grained retrieval. pytorch-metric-learning averages over rows whose loss is above 0,
    which leaves out rows that underflow.

    Args:
        margin: relaxation in [0, 1]: positives are wanted above 1 - margin, negatives below margin.
        gamma: scale, > 0.
    """

    takes_memory = True

    def __init__(self, margin: float = 0.4, gamma: float = 80.0) -> None:
        super().__init__()
        check_margin("margin", margin, high=1.0)
        if gamma <= 0:
            raise ValueError(f"gamma must be above 0, got {gamma:g}")
        self.margin, self.gamma = margin, gamma

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch by the gradient rule, a scalar."""
        s = pairs.similarity
        with torch.no_grad():
            factor_pos = self.gamma * (s - (1 + self.margin)).clamp(max=0)
            factor_neg = self.gamma * (s + self.margin).clamp(min=0)
        pull_B = log_sum_exp(factor_pos * (s - (1 - self.margin)), pairs.positives, dim=1)
        push_B = log_sum_exp(factor_neg * (s - self.margin), pairs.negatives, dim=1)
        has_both_B = pairs.positives.any(1) & pairs.negatives.any(1)
        return pairs.mean(F.softplus(pull_B + push_B).masked_fill(~has_both_B, 0).sum(), has_both_B.sum())

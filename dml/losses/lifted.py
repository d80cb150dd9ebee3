"""Generalised lifted structure loss."""

import torch
from torch import Tensor

from dml.losses.loss import Loss, check_margin, euclidean, log_sum_exp
from dml.pairs import Pairs


class GeneralizedLifted(Loss):
    """Of each row, all positives nearer than all negatives, both softly the hardest.

    With d = sqrt(2 - 2 s), the Euclidean distance of unit vectors, per row

        max(0, log sum_pos exp(d) + log sum_neg exp(margin - d))

    averaged over the rows of the global batch that have both a positive and a negative. A row with one kind only is no
    term here; pytorch-metric-learning lets the other sum count as 0 and averages over all rows.

    Hermans, Beyer and Leibe, In Defense of the Triplet Loss for Person Re-Identification, 2017, arXiv 1703.07737; it
    generalises Song et al., Deep Metric Learning via Lifted Structured Feature Embedding, CVPR 2016, arXiv 1511.06452.
    The L2 penalty on the embeddings' length that both carry is void on unit vectors.

    Args:
        margin: distance in [0, 2] by which the negatives are to be farther.
    """

    takes_memory = True

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        check_margin("margin", margin)
        self.margin = margin

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch by the gradient rule, a scalar."""
        d = euclidean(pairs.similarity)
        pull_B = log_sum_exp(d, pairs.positives, dim=1)
        push_B = log_sum_exp(self.margin - d, pairs.negatives, dim=1)
        has_both_B = pairs.positives.any(1) & pairs.negatives.any(1)
        return pairs.mean(torch.relu(pull_B + push_B).masked_fill(~has_both_B, 0).sum(), has_both_B.sum())

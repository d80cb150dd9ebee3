"""Smooth-AP loss."""

from torch import Tensor

from dml.losses.loss import Loss
from dml.losses.soft_ranks import soft_ranks
from dml.pairs import Pairs


class SmoothAP(Loss):
    """One minus the average precision of each row as a query, with soft ranks.

    Over the positives i of a row, ranks as in dml.losses.soft_ranks,

        1 - mean over i of (1 + above_pos_i) / (1 + above_pos_i + above_neg_i)

    averaged over the rows of the global batch with a positive. The query is not among its own results, as in the
    paper's formula; the authors' code and pytorch-metric-learning count it as one more positive, which shifts the value
    (every other rank is worse by one, and one precision is always about 1). Classes may differ in size, unlike there.

    Brown et al., Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval, ECCV 2020, arXiv 2007.12163.

    Args:
        temperature: of the sigmoid over differences of cosine similarity, > 0.
    """

    takes_memory = True

    def __init__(self, temperature: float = 0.01) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature:g}")
        self.temperature = temperature

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch by the gradient rule, a scalar."""
        ranks = soft_ranks(pairs, self.temperature)
        # 1 - precision, without the rounding of a difference of two numbers near 1.
        lost_BK = ranks.above_neg_BK / (1 + ranks.above_pos_BK + ranks.above_neg_BK)
        count_B = ranks.valid_BK.sum(1)
        lost_B = lost_BK.masked_fill(~ranks.valid_BK, 0).sum(1) / count_B.clamp(min=1)
        return pairs.mean(lost_B.sum(), (count_B > 0).sum())

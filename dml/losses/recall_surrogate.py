"""Recall@k surrogate loss (RS@k)."""

import torch
from torch import Tensor

from dml.losses.loss import Loss
from dml.losses.soft_ranks import soft_ranks
from dml.pairs import Pairs


class RecallSurrogate(Loss):
    """One minus a soft recall@k of each row as a query, averaged over k = 1, 2, 4, ... max_k.

    With the soft rank r_i = 1 + above_pos_i + above_neg_i of each positive i (dml.losses.soft_ranks, at
    rank_temperature), per row and k

        recall@k = min(k, sum over i of sigmoid((k - r_i) / recall_temperature)) / min(k, positives)

    averaged over k and over the rows of the global batch with a positive. The query is not among its own results. The
    two minima are those of the authors' code, so that a perfect ranking scores 1 also when k is below the number of
    positives; that code counts the query's similarity to itself as one more result before each positive, ours does not.
    Left out is the paper's mixup of similarities (SiMix).

    Patel, Tolias and Matas, Recall@k Surrogate Loss with Large Batches and Similarity Mixup, CVPR 2022, arXiv
    2108.11179; recall_temperature and rank_temperature are its tau_1 and tau_2.

    Args:
        rank_temperature: of the sigmoid over differences of cosine similarity, > 0.
        recall_temperature: of the sigmoid over ranks, > 0.
        max_k: the largest k, a whole number >= 1; the others are the powers of 2 below it.
    """

    takes_memory = True

    def __init__(self, rank_temperature: float = 0.01, recall_temperature: float = 1.0, max_k: float = 16) -> None:
        super().__init__()
        if rank_temperature <= 0 or recall_temperature <= 0:
            raise ValueError(f"temperatures must be above 0, got {rank_temperature:g} and {recall_temperature:g}")
        if max_k < 1 or max_k != int(max_k):
            raise ValueError(f"max_k must be a whole number of at least 1, got {max_k:g}")
        self.rank_temperature, self.recall_temperature = rank_temperature, recall_temperature
        below = int(max_k - 1).bit_length()  # powers of 2 below max_k
        self.ks = (*(2**power for power in range(below)), int(max_k))

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch by the gradient rule, a scalar."""
        ranks = soft_ranks(pairs, self.rank_temperature)
        rank_BK1 = (1 + ranks.above_pos_BK + ranks.above_neg_BK)[:, :, None]
        k_S = torch.tensor(self.ks, dtype=rank_BK1.dtype, device=rank_BK1.device)
        found_BKS = torch.sigmoid((k_S - rank_BK1) / self.recall_temperature)
        found_BS = found_BKS.masked_fill(~ranks.valid_BK[:, :, None], 0).sum(1)
        count_B = ranks.valid_BK.sum(1)
        # At least 1 in the denominator: a row without a positive is left out below, but its gradient must be finite.
        recall_BS = torch.minimum(found_BS, k_S) / torch.minimum(count_B.clamp(min=1)[:, None], k_S)
        missed_B = (1 - recall_BS).mean(1).masked_fill(count_B == 0, 0)
        return pairs.mean(missed_B.sum(), (count_B > 0).sum())

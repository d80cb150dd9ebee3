"""Proxy-Anchor loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dml.losses.loss import Loss, log1p_sum_exp
from dml.pairs import Pairs


class ProxyAnchor(Loss):
    """One learned proxy a class is the anchor; the whole batch is attracted or repelled.

    With s(x, p) the cosine similarity of embedding x and proxy p,

        mean over proxies with a positive in the batch of log(1 + sum_pos exp(-alpha (s - margin)))
      + mean over all proxies of                         log(1 + sum_neg exp( alpha (s + margin)))

    Each term couples the whole batch, so every rank computes it over the gathered batch.

    Kim et al., Proxy Anchor Loss for Deep Metric Learning, CVPR 2020, arXiv 2003.13911.

    Args:
        num_classes: C, training classes.
        dim: D, dimension of the embedding.
        margin: margin on the cosine similarity, >= 0.
        alpha: sharpness, > 0.
    """

    needs = frozenset({"num_classes", "dim"})

    def __init__(self, num_classes: int, dim: int, margin: float = 0.1, alpha: float = 32.0) -> None:
        super().__init__()
        if margin < 0 or alpha <= 0:
            raise ValueError(f"margin must be at least 0 and alpha above 0, got {margin:g} and {alpha:g}")
        self.margin, self.alpha = margin, alpha
        self.proxies = nn.Parameter(torch.empty(num_classes, dim))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch, the same on every rank, a scalar."""
        with torch.autocast(pairs.cols.device.type, enabled=False):
            s_NC = pairs.cols @ F.normalize(self.proxies.to(pairs.cols.dtype), dim=1).T
        own_NC = F.one_hot(pairs.col_labels, len(self.proxies)).bool()
        pull_C = log1p_sum_exp(-self.alpha * (s_NC - self.margin), own_NC, dim=0)
        push_C = log1p_sum_exp(self.alpha * (s_NC + self.margin), ~own_NC, dim=0)
        return pull_C.sum() / own_NC.any(0).sum().clamp(min=1) + push_C.mean()

"""Proxy-Anchor loss."""

import torch
from torch import Tensor

from dml.losses.loss import log1p_sum_exp
from dml.losses.proxies import ProxyLoss
from dml.pairs import Pairs


class ProxyAnchor(ProxyLoss):
    """One learned proxy a class is the anchor; the whole batch is attracted or repelled.

    With s(x, p) the cosine similarity of embedding x and proxy p,

        mean over proxies with a positive in the batch of log(1 + sum_pos exp(-alpha (s - margin)))
      + mean over all proxies of                         log(1 + sum_neg exp( alpha (s + margin)))

    Each term couples the whole batch, so every rank computes it over the gathered batch.

    Kim et al., Proxy Anchor Loss for Deep Metric Learning, CVPR 2020, arXiv 2003.13911.

    Args:
        num_classes: C, training classes.
        dim: D, dimension of the embedding.
        margin: margin on the cosine similarity, in [0, 1].
        alpha: sharpness, > 0.
    """

    def __init__(self, num_classes: int, dim: int, margin: float = 0.1, alpha: float = 32.0) -> None:
        super().__init__(num_classes, dim)
        if not 0 <= margin <= 1 or alpha <= 0:
            raise ValueError(f"margin must be in [0, 1] and alpha above 0, got {margin:g} and {alpha:g}")
        self.margin, self.alpha = margin, alpha

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch, the same on every rank, a scalar."""
        s_NC = self.similarity(pairs.cols)
        own_NC = pairs.col_labels[:, None] == torch.arange(len(self.proxies), device=s_NC.device)
        pull_C = log1p_sum_exp(-self.alpha * (s_NC - self.margin), own_NC, dim=0)
        push_C = log1p_sum_exp(self.alpha * (s_NC + self.margin), ~own_NC, dim=0)
        return pull_C.sum() / own_NC.any(0).sum().clamp(min=1) + push_C.mean()

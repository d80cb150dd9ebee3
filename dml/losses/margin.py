"""Margin loss, its boundary between near and far learned per class."""

import torch
from torch import Tensor, nn

from dml.losses.loss import TupleLoss, check_margin, euclidean, mean_of_violations
from dml.pairs import Pairs


class Margin(TupleLoss):
    """Positives within a boundary, negatives beyond it; the anchor's class learns where it lies.

        mean over tuples (a, p, n) of the terms above 0 of
            d(a, p) - beta[class of a] + margin      and      beta[class of a] - d(a, n) + margin

    d = sqrt(2 - 2 s) is the Euclidean distance of unit vectors. beta is trained with `optim.loss_lr` (5e-4 in the
    paper's protocol); the paper's weight nu on its size is 0, as it is there by default.

    Wu, Manmatha, Smola and Krähenbühl, Sampling Matters in Deep Embedding Learning, ICCV 2017, arXiv 1706.07567.

    Args:
        num_classes: C, training classes.
        margin: half the width of the gap around the boundary, a distance in [0, 2].
        beta: the boundary that every class begins with, a distance in [0, 2]; 1.2, or 0.6 for few classes.
        miner: distance_weighted unless another is named.
        rho: as TupleLoss.
    """

    needs = frozenset({"num_classes"})
    default_miner = "distance_weighted"

    def __init__(
        self, num_classes: int, margin: float = 0.2, beta: float = 1.2, *, miner: str | None = None, rho: float = 0.0
    ) -> None:
        super().__init__(miner, rho)
        check_margin("margin", margin)
        check_margin("beta", beta)
        self.margin = margin
        self.beta_C = nn.Parameter(torch.full((num_classes,), float(beta)))

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch by the gradient rule, a scalar."""
        anchor, positive, negative = self.tuples(pairs)
        beta = self.beta_C.to(pairs.rows.dtype)[pairs.row_labels[anchor]]
        pull = euclidean(pairs.similarity[anchor, positive]) - beta + self.margin
        push = beta - euclidean(pairs.similarity[anchor, negative]) + self.margin
        return mean_of_violations(pairs, torch.cat([pull, push]))

"""SoftTriple loss."""

import torch
from torch import Tensor

from dml.losses.loss import euclidean
from dml.losses.proxies import ProxyLoss, less_on_own, mean_cross_entropy
from dml.pairs import Pairs


class SoftTriple(ProxyLoss):
    """Classification by cosine similarity to several learned centroids a class, of which a class keeps what it needs.

    With s_ck the cosine similarity of an embedding of class y and the k-th of K centroids of class c, and

        s_c = sum over k of softmax over k of (s_ck / gamma) * s_ck

    the mean over the global batch of

        -log( exp(scale (s_y - margin)) / (exp(scale (s_y - margin)) + sum over c != y of exp(scale s_c)) )

    plus weight * the mean over classes and over a class's pairs of centroids of half their distance, which draws
    centroids together that a class does not need. The paper takes 10 centroids, Roth et al. (ICML 2020, arXiv
    2002.08473) 2. In pytorch-metric-learning the term of the centroids is its SparseCentersRegularizer.

    Qian et al., SoftTriple Loss: Deep Metric Learning Without Triplet Sampling, ICCV 2019, arXiv 1909.05235.

    Args:
        num_classes: C, training classes.
        dim: D, dimension of the embedding.
        centroids: K, whole and >= 1.
        scale: lambda of the paper, what similarities are multiplied by, > 0.
        gamma: temperature of the choice among a class's centroids, > 0.
        margin: cosine similarity in [0, 1].
        weight: tau of the paper, factor on the distance of centroids, >= 0.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        centroids: int = 2,
        scale: float = 20.0,
        gamma: float = 0.1,
        margin: float = 0.01,
        weight: float = 0.2,
    ) -> None:
        if centroids < 1 or centroids != int(centroids):
            raise ValueError(f"centroids must be a whole number, at least 1, got {centroids:g}")
        super().__init__(num_classes, dim, (int(centroids),))
        if scale <= 0 or gamma <= 0:
            raise ValueError(f"scale and gamma must be above 0, got {scale:g} and {gamma:g}")
        if not 0 <= margin <= 1:
            raise ValueError(f"margin is a cosine similarity in [0, 1], got {margin:g}")
        if weight < 0:
            raise ValueError(f"weight must be at least 0, got {weight:g}")
        self.scale, self.gamma, self.margin, self.weight = scale, gamma, margin, weight

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch by the gradient rule, a scalar."""
        with torch.autocast(pairs.rows.device.type, enabled=False):
            unit_CKD = self.unit(pairs.rows).view_as(self.proxies)
            s_BCK = (pairs.rows @ unit_CKD.flatten(0, 1).T).unflatten(1, self.proxies.shape[:2])
            distance_CKK = euclidean(unit_CKD @ unit_CKD.mT)
        s_BC = ((s_BCK / self.gamma).softmax(2) * s_BCK).sum(2)
        logits_BC = self.scale * less_on_own(s_BC, pairs.row_labels, self.margin)
        # Both triangles of distance_CKK, so twice the pairs. The same on every rank: its own mean over ranks.
        classes, count = unit_CKD.shape[:2]
        spread = distance_CKK.sum() / max(2 * classes * count * (count - 1), 1)
        return mean_cross_entropy(pairs, logits_BC) + self.weight * spread

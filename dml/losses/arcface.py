"""ArcFace and CosFace: softmax over cosine similarities with a margin on the own class."""

import math

import torch
from torch import Tensor

from dml.losses.proxies import ProxyLoss, less_on_own, mean_cross_entropy
from dml.pairs import Pairs


class ArcFace(ProxyLoss):
    """Softmax over cosine similarities to proxies, with a margin on the angle to the own proxy.

    With t_c the angle between an embedding of class y and the proxy of class c, the mean over the global batch of

        -log( exp(scale cos(t_y + margin)) / (exp(scale cos(t_y + margin)) + sum over c != y of exp(scale cos t_c)) )

    Beyond t_y = pi - margin, where the cosine would rise again, cos t_y - margin sin(margin) takes its place, as in the
    public implementations. The paper's scale of 64 is for some 10^5 identities; 16 is for hundreds of classes.
    pytorch-metric-learning's ArcFaceLoss takes the margin in degrees.

    Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, CVPR 2019, arXiv 1801.07698.

    Args:
        num_classes: C, training classes.
        dim: D, dimension of the embedding.
        margin: angle in radians, in [0, pi/2].
        scale: what cosines are multiplied by, > 0.
    """

    def __init__(self, num_classes: int, dim: int, margin: float = 0.5, scale: float = 16.0) -> None:
        super().__init__(num_classes, dim)
        if not 0 <= margin <= math.pi / 2:
            raise ValueError(f"margin is an angle in radians in [0, pi/2], got {margin:g}")
        if scale <= 0:
            raise ValueError(f"scale must be above 0, got {scale:g}")
        self.margin, self.scale = margin, scale

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch by the gradient rule, a scalar."""
        s_BC, labels_B1 = self.similarity(pairs.rows), pairs.row_labels[:, None]
        own_B1, sine, cosine = s_BC.gather(1, labels_B1), math.sin(self.margin), math.cos(self.margin)
        # By the addition theorem, since the slope of acos is infinite at 1 and -1; the root's is too, hence its floor.
        turned_B1 = own_B1 * cosine - (1 - own_B1.square()).clamp(min=1e-6).sqrt() * sine
        narrowed_B1 = torch.where(own_B1 >= -cosine, turned_B1, own_B1 - self.margin * sine)
        return mean_cross_entropy(pairs, self.scale * s_BC.scatter(1, labels_B1, narrowed_B1))


class CosFace(ProxyLoss):
    """Softmax over cosine similarities to proxies, with a margin on the cosine to the own proxy.

    With s_c the cosine similarity of an embedding of class y to the proxy of class c, the mean over the global batch of

        -log( exp(scale (s_y - margin)) / (exp(scale (s_y - margin)) + sum over c != y of exp(scale s_c)) )

    The paper's scale of 64 is for some 10^4 identities; 16 is for hundreds of classes.

    Wang et al., CosFace: Large Margin Cosine Loss for Deep Face Recognition, CVPR 2018, arXiv 1801.09414.

    Args:
        num_classes: C, training classes.
        dim: D, dimension of the embedding.
        margin: cosine similarity in [0, 1].
        scale: what cosines are multiplied by, > 0.
    """

    def __init__(self, num_classes: int, dim: int, margin: float = 0.35, scale: float = 16.0) -> None:
        super().__init__(num_classes, dim)
        if not 0 <= margin <= 1:
            raise ValueError(f"margin is a cosine similarity in [0, 1], got {margin:g}")
        if scale <= 0:
            raise ValueError(f"scale must be above 0, got {scale:g}")
        self.margin, self.scale = margin, scale

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch by the gradient rule, a scalar."""
        s_BC = less_on_own(self.similarity(pairs.rows), pairs.row_labels, self.margin)
        return mean_cross_entropy(pairs, self.scale * s_BC)

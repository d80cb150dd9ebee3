"""What losses with learned proxies share: the proxies, and how similar embeddings are to them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dml.losses.loss import Loss
from dml.pairs import Pairs


class ProxyLoss(Loss):
    """A loss over learned vectors, one or more a class, in place of the batch's other samples.

    The proxies enter at unit length. They are drawn from a normal distribution with an expected length of about 1, so
    that one learning rate (optim.loss_lr) turns them alike for any number of classes and any dimension; the papers'
    first lengths differ, and change nothing but that rate.

    Every rank holds all proxies. Their gradients are averaged over ranks (`dml.gather.average_gradients`), so they
    stay equal.

    Args:
        num_classes: C, training classes, at least 2.
        dim: D, dimension of the embedding.
        shape: further axes between class and dimension.

    Attributes:
        proxies: parameter (C, *shape, D), of any length but zero.
    """

    needs = frozenset({"num_classes", "dim"})
    needs_positives = False

    def __init__(self, num_classes: int, dim: int, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}: other classes' proxies are negatives")
        self.proxies = nn.Parameter(torch.randn(num_classes, *shape, dim) / dim**0.5)

    def unit(self, like: Tensor) -> Tensor:
        """The proxies at unit length, flat (C * ..., D), in the dtype of another tensor."""
        return F.normalize(self.proxies.flatten(0, -2).to(like.dtype), dim=1)

    def similarity(self, rows_BD: Tensor) -> Tensor:
        """Cosine similarity (B, C * ...) of unit rows and proxies, in full precision also under autocast."""
        with torch.autocast(rows_BD.device.type, enabled=False):
            return rows_BD @ self.unit(rows_BD).T


def less_on_own(s_BC: Tensor, labels_B: Tensor, margin: float) -> Tensor:
    """Similarities to classes, with a margin taken off at each row's own class."""
    own_B1 = labels_B[:, None]
    return s_BC.scatter_add(1, own_B1, s_BC.new_full(own_B1.shape, -margin))


def mean_cross_entropy(pairs: Pairs, logits_BC: Tensor) -> Tensor:
    """The mean over the global batch of -log softmax at each row's class, by the gradient rule of dml.gather."""
    return pairs.mean(F.cross_entropy(logits_BC, pairs.row_labels, reduction="sum"), len(logits_BC))

"""Normalised softmax loss."""

from torch import Tensor

from dml.losses.proxies import ProxyLoss, mean_cross_entropy
from dml.pairs import Pairs


class NormalizedSoftmax(ProxyLoss):
    """Classification by cosine similarity to one learned proxy a class.

    With s(x, p) the cosine similarity of an embedding x of class y and a proxy p, the mean over the global batch of

        -log( exp(s(x, p_y) / temperature) / sum over all classes c of exp(s(x, p_c) / temperature) )

    Zhai and Wu, Classification is a Strong Baseline for Deep Metric Learning, BMVC 2019, arXiv 1811.12649.

    Args:
        num_classes: C, training classes.
        dim: D, dimension of the embedding.
        temperature: what similarities are divided by, > 0.
    """

    def __init__(self, num_classes: int, dim: int, temperature: float = 0.05) -> None:
        super().__init__(num_classes, dim)
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature:g}")
        self.temperature = temperature

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch by the gradient rule, a scalar."""
        return mean_cross_entropy(pairs, self.similarity(pairs.rows) / self.temperature)

"""Proxy-NCA and Proxy-NCA++."""

from torch import Tensor

from dml.losses.proxies import ProxyLoss, mean_cross_entropy
from dml.pairs import Pairs


class ProxyNCA(ProxyLoss):
    """Neighbourhood components analysis against one learned proxy a class; the own proxy is not in the denominator.

    With d(x, p) = 2 - 2 s, the squared distance of unit vectors, the mean over the global batch of

        -log( exp(-d(x, p_y) / temperature) / sum over classes c other than y of exp(-d(x, p_c) / temperature) )

    which falls below 0 for embeddings that lie well. The paper leaves the length of the vectors open; public
    implementations take 3, which is a temperature of 1/9. pytorch-metric-learning's ProxyNCALoss sums over all
    classes in the denominator, as Proxy-NCA++ does.

    Movshovitz-Attias et al., No Fuss Distance Metric Learning using Proxies, ICCV 2017, arXiv 1703.07464.

    Args:
        num_classes: C, training classes.
        dim: D, dimension of the embedding.
        temperature: what squared distances are divided by, > 0.
    """

    def __init__(self, num_classes: int, dim: int, temperature: float = 1 / 9) -> None:
        super().__init__(num_classes, dim)
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature:g}")
        self.temperature = temperature

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch by the gradient rule, a scalar."""
        # -d = 2 s - 2, and the constant is in numerator and denominator.
        logits_BC, own_B1 = 2 * self.similarity(pairs.rows) / self.temperature, pairs.row_labels[:, None]
        others_B = logits_BC.scatter(1, own_B1, float("-inf")).logsumexp(1)
        return pairs.mean((others_B - logits_BC.gather(1, own_B1)[:, 0]).sum(), len(logits_BC))


class ProxyNCAPlusPlus(ProxyNCA):
    """The probability of the own proxy among all proxies, at a low temperature.

    With d(x, p) = 2 - 2 s, the squared distance of unit vectors, the mean over the global batch of

        -log( exp(-d(x, p_y) / temperature) / sum over all classes c of exp(-d(x, p_c) / temperature) )

    For unit vectors that is the normalised softmax at half the temperature. What else the paper adds belongs to
    encoder and optimiser: pooling by maximum, layer norm, and proxies that learn faster (optim.loss_lr).

    Teh, DeVries and Taylor, ProxyNCA++: Revisiting and Revitalizing Proxy Neighborhood Component Analysis, ECCV 2020,
    arXiv 2004.01113.

    Args:
        num_classes: C, training classes.
        dim: D, dimension of the embedding.
        temperature: what squared distances are divided by, > 0.
    """

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch by the gradient rule, a scalar."""
        return mean_cross_entropy(pairs, 2 * self.similarity(pairs.rows) / self.temperature)

"""NT-Xent and SupCon: a softmax over the similarities of a row, with its positives as the right answers."""

import torch.nn.functional as F
from torch import Tensor

from dml.losses.loss import Loss, log_sum_exp
from dml.pairs import Pairs


class NTXent(Loss):
    """Cross-entropy of each positive pair against the row's negatives.

    With t = s / temperature, the mean over all positive pairs (row, p) of the global batch of

        -log(exp(t_p) / (exp(t_p) + sum_neg exp(t)))

    The multi-positive form: a pair competes with the row's negatives, not with its other positives. With two samples a
    class it is SimCLR's loss, and the N-pair loss of Sohn (2016) with a temperature.

    Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020, arXiv 2002.05709.
    pytorch-metric-learning has the same form with a temperature of 0.07.

    Args:
        temperature: > 0.
    """

    takes_memory = True

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = _positive(temperature)

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch by the gradient rule, a scalar."""
        scaled = pairs.similarity / self.temperature
        each = F.softplus(log_sum_exp(scaled, pairs.negatives, dim=1)[:, None] - scaled)
        return pairs.mean(each.masked_fill(~pairs.positives, 0).sum(), pairs.positives.sum())


class SupCon(Loss):
    """Cross-entropy of a row's positives against all other samples, averaged outside the logarithm.

    With t = s / temperature, per row

        - mean over its positives of log(exp(t_p) / sum over all others of exp(t))

    averaged over the rows of the global batch with a positive: L_out of the paper, the form it recommends. Unlike
    NT-Xent the positives are in the denominator too. On a batch without any negative pair it still spreads the
    positives evenly; pytorch-metric-learning, otherwise the same, gives 0 there.

    Khosla et al., Supervised Contrastive Learning, NeurIPS 2020, arXiv 2004.11362.

    Args:
        temperature: > 0.
    """

    takes_memory = True

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = _positive(temperature)

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch by the gradient rule, a scalar."""
        scaled = pairs.similarity / self.temperature
        count_B = pairs.positives.sum(1)
        right_B = scaled.masked_fill(~pairs.positives, 0).sum(1) / count_B.clamp(min=1)
        each_B = log_sum_exp(scaled, pairs.positives | pairs.negatives, dim=1) - right_B
        return pairs.mean(each_B.masked_fill(count_B == 0, 0).sum(), (count_B > 0).sum())


def _positive(temperature: float) -> float:
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature:g}")
    return temperature

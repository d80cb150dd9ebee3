"""An exponential moving average of an encoder's weights, which is then the encoder that is evaluated and kept."""

import copy

import torch
from torch import Tensor, nn

from dml.encoders import Encoder


class EMA:
    """Weights averaged over the steps of a training, the later ones counting most.

        average <- d * average + (1 - d) * weights        d = min(decay, (1 + t) / (10 + t)) at update t

    t makes the average follow closely at first, or random initial weights would stay in it for 1 / (1 - decay) steps.
    Floating buffers (BatchNorm's statistics) are averaged alike, others taken over. Nothing is read from the device.
    Ranks whose weights are equal have equal averages without a collective.

    Averaging: Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, SIAM J. Control Optim. 1992;
    its exponential form for networks: Tarvainen and Valpola, Mean Teachers, NeurIPS 2017, arXiv 1703.01780.

    Args:
        encoder: copied, with the weights that it has now.
        decay: d in [0, 1) once t is large; 0.999 averages over about 1,000 steps.

    Attributes:
        encoder: the average, in evaluation mode and without gradients.
        updates: t, updates done; with the encoder's weights all that a resumed training needs.
    """

    def __init__(self, encoder: Encoder, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is in [0, 1), got {decay:g}")
        self.encoder = copy.deepcopy(encoder).requires_grad_(False).eval()
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, encoder: nn.Module) -> None:
        """Takes in the weights of a step.

        Args:
            encoder: of the same shape as the one it began with.
        """
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        averaged: list[Tensor] = []
        towards: list[Tensor] = []
        for mine, other in zip(_tensors(self.encoder), _tensors(encoder), strict=True):
            if mine.is_floating_point():
                averaged.append(mine)
                towards.append(other)
            else:
                mine.copy_(other)
        torch._foreach_lerp_(averaged, towards, 1 - decay)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]

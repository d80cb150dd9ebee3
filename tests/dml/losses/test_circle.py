"""Circle loss against its formula and against pytorch-metric-learning's."""

import math
from collections.abc import Sequence

import pytest
import torch
from pytorch_metric_learning import losses as peer
from torch import nn

from dml import losses
from dml.losses.circle import Circle
from dml.pairs import Pairs
from tests.contracts.row_loss_contract import RowLossContract


class TestCircle(RowLossContract):
    def make(self) -> nn.Module:
        return losses.build("circle", margin=0.3, gamma=6.0)

    def row(self, s: Sequence[float], held: Sequence[float], pos: list[int], neg: list[int]) -> tuple[float, int]:
        if not pos or not neg:
            return 0.0, 0
        pull = sum(math.exp(-6 * max(0, 1.3 - held[p]) * (s[p] - 0.7)) for p in pos)
        push = sum(math.exp(6 * max(0, held[n] + 0.3) * (s[n] - 0.3)) for n in neg)
        return math.log(1 + pull * push), 1


def test_pytorch_metric_learning_has_the_same_at_the_published_scale() -> None:
    rows = torch.randn(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(12) % 4
    ours, theirs = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    value, expected = Circle()(Pairs.of(ours, labels)), peer.CircleLoss(m=0.4, gamma=80)(theirs, labels)
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_similarity_beyond_its_optimum_is_let_be() -> None:
    # The negative at s = -1 is below -margin: its factor is 0, so it feels no push while the positive is still pulled.
    rows = torch.tensor([[1.0, 0], [0.6, 0.8], [-1, 0]], dtype=torch.float64)
    pairs = Pairs.of(rows.requires_grad_(), torch.tensor([0, 0, 1]))
    (slope,) = torch.autograd.grad(Circle()(pairs), pairs.similarity)
    assert slope[0, 2] == 0
    assert slope[0, 1] < 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"margin": -0.1}, r"margin is in \[0, 1\], got -0.1"), ({"gamma": 0.0}, "gamma must be above 0, got 0")],
)
def test_refuses_what_makes_no_sense(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Circle(**options)

"""NT-Xent and SupCon against their formulas and against pytorch-metric-learning's."""

import math
from collections.abc import Sequence

import pytest
import torch
from pytorch_metric_learning import losses as peer
from torch import Tensor, nn

from dml import losses
from dml.losses.contrastive_softmax import NTXent, SupCon
from dml.pairs import Pairs
from tests.contracts.row_loss_contract import RowLossContract


class TestNTXent(RowLossContract):
    def make(self) -> nn.Module:
        return losses.build("nt_xent", temperature=0.4)

    def row(self, s: Sequence[float], held: Sequence[float], pos: list[int], neg: list[int]) -> tuple[float, int]:
        e = [math.exp(x / 0.4) for x in s]
        return sum(-math.log(e[p] / (e[p] + sum(e[n] for n in neg))) for p in pos), len(pos)


class TestSupCon(RowLossContract):
    def make(self) -> nn.Module:
        return losses.build("supcon", temperature=0.4)

    def row(self, s: Sequence[float], held: Sequence[float], pos: list[int], neg: list[int]) -> tuple[float, int]:
        if not pos:
            return 0.0, 0
        e = [math.exp(x / 0.4) for x in s]
        return sum(-math.log(e[p] / sum(e[j] for j in pos + neg)) for p in pos) / len(pos), 1


def batch(labels: list[int]) -> tuple[Tensor, Tensor]:
    rows = torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return rows, torch.tensor(labels)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(NTXent(0.07), peer.NTXentLoss(temperature=0.07)), (SupCon(0.1), peer.SupConLoss(temperature=0.1))],
    ids=["nt_xent", "supcon"],
)
@pytest.mark.parametrize("labels", [[0, 1, 2, 3] * 3, [0, 0, 0, 1, 1, 2]], ids=["balanced", "ragged"])
def test_pytorch_metric_learning_has_the_same(ours: nn.Module, theirs: nn.Module, labels: list[int]) -> None:
    """Its sums of exponentials keep small numbers away from 0, which shows at 1e-6."""
    rows, known = batch(labels)
    our_rows, their_rows = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    value, expected = ours(Pairs.of(our_rows, known)), theirs(their_rows, known)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    value.backward()
    expected.backward()
    torch.testing.assert_close(our_rows.grad, their_rows.grad, rtol=1e-4, atol=1e-6)


def test_with_two_samples_a_class_both_are_the_loss_of_simclr() -> None:
    """Cross-entropy over all other samples with the one positive as the answer."""
    rows, known = batch([0, 1, 2, 0, 1, 2])
    unit = rows / rows.norm(dim=1, keepdim=True)
    logits = (unit @ unit.T / 0.2).fill_diagonal_(-torch.inf)
    expected = nn.functional.cross_entropy(logits, torch.tensor([3, 4, 5, 0, 1, 2]))
    for loss in (NTXent(0.2), SupCon(0.2)):
        torch.testing.assert_close(loss(Pairs.of(rows, known)), expected)


@pytest.mark.parametrize("loss", [NTXent(0.001), SupCon(0.001)], ids=["nt_xent", "supcon"])
def test_a_tiny_temperature_does_not_overflow(loss: nn.Module) -> None:
    rows = torch.eye(2)[[0, 1, 0, 1]].requires_grad_()
    value = loss(Pairs.of(rows, torch.tensor([0, 0, 1, 1])))
    value.backward()
    assert float(value.detach()) == pytest.approx(1000)  # positives at similarity 0, a negative at 1
    assert torch.isfinite(rows.grad).all()


@pytest.mark.parametrize("cls", [NTXent, SupCon])
def test_refuses_a_temperature_that_is_not_positive(cls: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"temperature must be above 0, got -0\.1"):
        cls(temperature=-0.1)

"""Margin loss and its learned boundary against the formula and pytorch-metric-learning."""

import torch
from pytorch_metric_learning import losses as theirs
from torch import Tensor, nn

from dml import losses
from dml.pairs import Pairs
from tests.contracts.loss_contract import CLASSES, DIM, LossContract
from tests.dml.losses.test_triplet import apart, hardest


class TestMargin(LossContract):
    def make(self) -> nn.Module:
        loss = losses.build("margin", num_classes=CLASSES, miner="hardest")
        with torch.no_grad():
            loss.beta_C.copy_(torch.tensor([1.2, 0.9, 1.0, 1.3]))
        return loss

    def oracle(self, loss: nn.Module, unit_ND: Tensor, labels_N: Tensor) -> float:
        terms = []
        for a, p, n in hardest(unit_ND, labels_N):
            beta = float(loss.beta_C.detach()[labels_N[a]])
            terms += [apart(unit_ND, a, p) - beta + 0.2, beta - apart(unit_ND, a, n) + 0.2]
        active = [term for term in terms if term > 0]
        return sum(active) / max(1, len(active))


def test_value_and_gradients_of_pytorch_metric_learning_on_the_same_triplets() -> None:
    rows, labels = torch.randn(24, DIM, dtype=torch.float64), torch.arange(24) // 4
    ours = losses.build("margin", num_classes=6).double()
    other = theirs.MarginLoss(margin=0.2, beta=1.2, learn_beta=True, num_classes=6).double()
    first, second = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    pairs = Pairs.of(first, labels)
    value, expected = ours(pairs), other(second, labels, indices_tuple=ours.tuples(pairs))
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(first.grad, second.grad)
    torch.testing.assert_close(ours.beta_C.grad, other.beta.grad)
    assert ours.beta_C.grad.abs().max() > 0

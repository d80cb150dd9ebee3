"""Histogram loss against its formula and against pytorch-metric-learning's."""

import math

import pytest
import torch
from pytorch_metric_learning import losses as peer
from torch import Tensor, nn

from dml import losses
from dml.losses.histogram import Histogram
from dml.pairs import Pairs
from tests.contracts.loss_contract import DIM, LossContract, same_sample


class TestHistogram(LossContract):
    bins = 9

    def make(self) -> nn.Module:
        return losses.build("histogram", bins=self.bins)

    def oracle(self, loss: nn.Module, unit_ND: Tensor, labels_N: Tensor) -> float:
        """Unordered pairs, one triangle of weight to each node, as the paper has it."""
        width = 2 / self.bins
        nodes = [-1 + width * r for r in range(self.bins + 1)]
        h = {True: [0.0] * len(nodes), False: [0.0] * len(nodes)}
        for i in range(len(labels_N)):
            for j in range(i):
                if same_sample(labels_N, i, j):
                    continue
                s = float(unit_ND[i] @ unit_ND[j])
                for r, node in enumerate(nodes):
                    h[bool(labels_N[i] == labels_N[j])][r] += max(0, 1 - abs(s - node) / width)
        pos, neg = ([x / max(sum(h[same]), 1e-300) for x in h[same]] for same in (True, False))
        return sum(neg[r] * sum(pos[: r + 1]) for r in range(len(nodes)))


def test_pytorch_metric_learning_has_the_same() -> None:
    rows = torch.randn(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3])
    ours, theirs = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    value, expected = Histogram(100)(Pairs.of(ours, labels)), peer.HistogramLoss(n_bins=100)(theirs, labels)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)  # its places in the bins are float32
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_apart_is_0_and_the_wrong_way_round_is_1() -> None:
    near, far = [1.0, 0.0], [-1.0, 0.0]
    apart = Pairs.of(torch.tensor([near, near, far, far]), torch.tensor([0, 0, 1, 1]))
    assert float(Histogram()(apart)) == 0
    # The one positive pair is at -1, of the negative pairs two are at 1 and two at -1.
    wrong = Pairs.of(torch.tensor([near, far, near, far]), torch.tensor([0, 0, 1, 1]))
    assert float(Histogram()(wrong)) == 1


def test_moving_a_similarity_moves_the_loss_by_its_slope() -> None:
    """A large batch in float32: the table of slopes against a difference of values in float64."""
    rows = torch.randn(96, DIM, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.arange(96) % 24
    Histogram()(Pairs.of(rows, labels)).backward()
    step = torch.randn(96, DIM, generator=torch.Generator().manual_seed(2)).double() * 1e-7
    wide = rows.detach().double()
    up, down = (Histogram()(Pairs.of(wide + sign * step, labels)) for sign in (1, -1))
    assert float((rows.grad.double() * step).sum()) == pytest.approx(float(up - down) / 2, rel=1e-3)


@pytest.mark.parametrize("bins", [0, 2.5])
def test_refuses_a_number_of_bins_that_is_none(bins: float) -> None:
    with pytest.raises(ValueError, match=f"bins must be a whole number of at least 1, got {bins:g}"):
        Histogram(bins)


def test_a_batch_without_one_kind_of_pair_gives_0() -> None:
    for labels in ([0, 1, 2], [0, 0, 0]):
        rows = torch.randn(3, DIM, generator=torch.Generator().manual_seed(0))
        value = float(Histogram()(Pairs.of(rows, torch.tensor(labels))))
        assert math.isclose(value, 0)

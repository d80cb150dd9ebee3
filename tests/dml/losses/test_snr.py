"""SNR-contrastive loss over all pairs and over mined ones, against its formula and pytorch-metric-learning."""

import pytest
import torch
from pytorch_metric_learning import losses as theirs
from torch import Tensor, nn

from dml import losses
from dml.pairs import Pairs
from tests.contracts.loss_contract import DIM, LossContract, partners
from tests.dml.losses.test_triplet import hardest


def ratio(unit: Tensor, a: int, x: int) -> float:
    return float((unit[a] - unit[x]).var() / unit[a].var())


def mean_above_zero(terms: list[float]) -> float:
    active = [term for term in terms if term > 0]
    return sum(active) / max(1, len(active))


class TestSNRContrastive(LossContract):
    def make(self) -> nn.Module:
        return losses.build("snr_contrastive", margin_pos=0.1, margin_neg=2.0, weight_mean=0.3)

    def tuples(self, unit: Tensor, labels: Tensor) -> list[tuple[int, list[int], list[int]]]:
        return [(row, *partners(labels, row)) for row in range(len(labels))]

    def oracle(self, loss: nn.Module, unit_ND: Tensor, labels_N: Tensor) -> float:
        pull, push, anchors = [], [], []
        for a, positives, negatives in self.tuples(unit_ND, labels_N):
            pull += [ratio(unit_ND, a, p) - 0.1 for p in positives]
            push += [2.0 - ratio(unit_ND, a, n) for n in negatives]
            anchors += [abs(float(unit_ND[a].sum()))] if positives or negatives else []
        return mean_above_zero(pull) + mean_above_zero(push) + 0.3 * sum(anchors) / max(1, len(anchors))


class TestMinedSNRContrastive(TestSNRContrastive):
    def make(self) -> nn.Module:
        return losses.build("snr_contrastive", margin_pos=0.1, margin_neg=2.0, weight_mean=0.3, miner="hardest")

    def tuples(self, unit: Tensor, labels: Tensor) -> list[tuple[int, list[int], list[int]]]:
        return [(a, [p], [n]) for a, p, n in hardest(unit, labels)]


def test_the_value_of_pytorch_metric_learning_without_the_last_term() -> None:
    """It has the last term as a regulariser of its own, and no unit norm of its own."""
    unit = nn.functional.normalize(torch.randn(24, DIM, dtype=torch.float64))
    labels = torch.arange(24) // 4
    ours = losses.build("snr_contrastive", margin_pos=0.01, margin_neg=2.0, weight_mean=0.0)
    other = theirs.SignalToNoiseRatioContrastiveLoss(pos_margin=0.01, neg_margin=2.0)
    torch.testing.assert_close(ours(Pairs.of(unit, labels)), other(unit, labels))


def test_between_centred_vectors_the_ratio_is_the_squared_distance() -> None:
    rows = torch.randn(6, DIM, dtype=torch.float64)
    rows -= rows.mean(1, keepdim=True)
    loss = losses.build("snr_contrastive", margin_neg=0.0)
    pairs = Pairs.of(rows, torch.zeros(6, dtype=torch.int64))
    expected = (2 - 2 * pairs.similarity)[pairs.positives].mean()
    assert float(loss(pairs)) == pytest.approx(float(expected), rel=1e-9)

"""Smooth-AP against its formula, against pytorch-metric-learning's, and against the average precision itself."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from pytorch_metric_learning import losses as peer
from torch import nn

from dml import losses
from dml.losses.smooth_ap import SmoothAP
from dml.pairs import Pairs
from tests.contracts.row_loss_contract import RowLossContract


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class TestSmoothAP(RowLossContract):
    def make(self) -> nn.Module:
        return losses.build("smooth_ap", temperature=0.2)

    def row(self, s: Sequence[float], held: Sequence[float], pos: list[int], neg: list[int]) -> tuple[float, int]:
        if not pos:
            return 0.0, 0
        precision = []
        for i in pos:
            among_pos = 1 + sum(sigmoid((s[j] - s[i]) / 0.2) for j in pos if j != i)
            precision.append(among_pos / (among_pos + sum(sigmoid((s[j] - s[i]) / 0.2) for j in neg)))
        return 1 - sum(precision) / len(pos), 1


def test_pytorch_metric_learning_has_the_same_with_the_query_among_its_own_positives() -> None:
    """Of sorted classes of one size, as it asks, and as many classes as samples a class: version 2.9 takes one for the
    other where it cuts the batch into classes, and is wrong otherwise.
    """
    rows = torch.randn(16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(16) // 4
    ours, theirs = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    nobody_left_out = replace(Pairs.of(ours, labels), row_offset=16)
    value, expected = SmoothAP(0.05)(nobody_left_out), peer.SmoothAPLoss(temperature=0.05)(theirs, labels)
    torch.testing.assert_close(value.float(), expected, rtol=1e-6, atol=1e-6)
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_a_cold_temperature_gives_the_average_precision() -> None:
    rows = torch.randn(40, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.arange(40) % 7
    pairs = Pairs.of(rows, labels)
    precisions = []
    for row, s in enumerate(pairs.similarity.tolist()):
        ranking = sorted((j for j in range(40) if j != row), key=lambda j, s=s: -s[j])
        hits = [rank for rank, j in enumerate(ranking, start=1) if labels[j] == labels[row]]
        precisions.append(sum(found / rank for found, rank in enumerate(hits, start=1)) / len(hits))
    assert float(SmoothAP(1e-7)(pairs)) == pytest.approx(1 - sum(precisions) / 40, abs=1e-6)


def test_classes_apart_lose_nothing_and_feel_nothing() -> None:
    rows = torch.eye(3).repeat_interleave(2, 0).requires_grad_()
    value = SmoothAP()(Pairs.of(rows, torch.arange(6) // 2))
    value.backward()
    assert float(value.detach()) == pytest.approx(0, abs=1e-18)
    assert rows.grad.abs().max() < 1e-18


def test_refuses_a_temperature_that_is_not_positive() -> None:
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        SmoothAP(0.0)

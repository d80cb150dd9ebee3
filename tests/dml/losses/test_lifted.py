"""Generalised lifted structure loss against its formula and against pytorch-metric-learning's."""

import math
from collections.abc import Sequence

import pytest
import torch
from pytorch_metric_learning import losses as peer
from torch import nn

from dml import losses
from dml.losses.lifted import GeneralizedLifted
from dml.pairs import Pairs
from tests.contracts.row_loss_contract import RowLossContract


class TestGeneralizedLifted(RowLossContract):
    def make(self) -> nn.Module:
        return losses.build("generalized_lifted", margin=0.7)

    def row(self, s: Sequence[float], held: Sequence[float], pos: list[int], neg: list[int]) -> tuple[float, int]:
        if not pos or not neg:
            return 0.0, 0
        d = [math.sqrt(max(2 - 2 * x, 0)) for x in s]
        return max(0, math.log(sum(math.exp(d[p]) for p in pos)) + math.log(sum(math.exp(0.7 - d[n]) for n in neg))), 1


def test_pytorch_metric_learning_has_the_same_where_every_row_has_both_kinds() -> None:
    rows = torch.randn(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(12) % 4
    ours, theirs = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    value = GeneralizedLifted(1.0)(Pairs.of(ours, labels))
    expected = peer.GeneralizedLiftedStructureLoss(neg_margin=1, pos_margin=0)(theirs, labels)
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_negative_beyond_all_positives_by_far_costs_nothing() -> None:
    # d of the positives is 0, of the negatives 2: 0 + log(2 exp(1 - 2)) is below 0.
    rows = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])
    assert float(GeneralizedLifted(1.0)(Pairs.of(rows, torch.tensor([0, 0, 1, 1])))) == 0


def test_refuses_a_margin_that_no_distance_has() -> None:
    with pytest.raises(ValueError, match=r"margin is in \[0, 2\], got 2.5"):
        GeneralizedLifted(2.5)

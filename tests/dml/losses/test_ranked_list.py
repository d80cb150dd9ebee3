"""Ranked list loss against its formula and against pytorch-metric-learning's."""

import math
from collections.abc import Sequence

import pytest
import torch
from pytorch_metric_learning import losses as peer
from torch import nn

from dml import losses
from dml.losses.ranked_list import RankedList
from dml.pairs import Pairs
from tests.contracts.row_loss_contract import RowLossContract


class TestRankedList(RowLossContract):
    def make(self) -> nn.Module:
        return losses.build("ranked_list", alpha=1.4, margin=0.6, heat_neg=3.0, heat_pos=1.5, balance=0.3)

    def row(self, s: Sequence[float], held: Sequence[float], pos: list[int], neg: list[int]) -> tuple[float, int]:
        def weighted(x: list[float], x_held: list[float], heat: float) -> float:
            weights = [math.exp(heat * h) if h > 0 else 0 for h in x_held]
            return sum(w * v for w, v in zip(weights, x, strict=True)) / (sum(weights) or 1)

        d, d_held = ([math.sqrt(max(2 - 2 * x, 0)) for x in values] for values in (s, held))
        pull = weighted([d[p] - 0.8 for p in pos], [d_held[p] - 0.8 for p in pos], 1.5)
        push = weighted([1.4 - d[n] for n in neg], [1.4 - d_held[n] for n in neg], 3.0)
        return 0.7 * pull + 0.3 * push, 1


@pytest.mark.parametrize("heat", [0.0, 2.0])
def test_pytorch_metric_learning_has_the_same_value(heat: float) -> None:
    """To the 1e-5 a column that it adds to the sum of weights; the same gradient where weights are constant anyway."""
    rows = torch.randn(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(12) % 4
    ours, theirs = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    value = RankedList(alpha=1.2, margin=0.4, heat_neg=heat)(Pairs.of(ours, labels))
    expected = peer.RankedListLoss(margin=0.4, Tn=heat, alpha=1.2)(theirs, labels)
    torch.testing.assert_close(value, expected, rtol=2e-4, atol=0)
    value.backward()
    expected.backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6) == (heat == 0)


def test_negatives_share_the_push_by_their_weight() -> None:
    # Of row 0 the negatives lie at distances 0.6 and 1.0; its push goes to them as exp(10 * 0.6) : exp(10 * 0.2).
    angles = [2 * math.asin(d / 2) for d in (0.0, 0.6, -1.0)]
    rows = torch.tensor([[math.cos(a), math.sin(a)] for a in angles], dtype=torch.float64)
    pairs = Pairs.of(rows, torch.tensor([0, 1, 2]))
    d = (2 - 2 * pairs.similarity[0]).sqrt().tolist()
    near, far = math.exp(10 * (1.2 - d[1])), math.exp(10 * (1.2 - d[2]))
    alone = RankedList(balance=1.0)(Pairs(rows[:1], rows, torch.tensor([0]), torch.tensor([0, 1, 2]), None, 0, None))
    assert float(alone) == pytest.approx((near * (1.2 - d[1]) + far * (1.2 - d[2])) / (near + far))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 2.1}, r"alpha is in \[0, 2\], got 2.1"),
        ({"alpha": 0.3}, r"margin is in \[0, 0.3\], got 0.4"),
        ({"heat_neg": -1.0}, "must be at least 0, got -1 and 0"),
        ({"balance": 1.5}, r"balance is in \[0, 1\], got 1.5"),
    ],
)
def test_refuses_what_makes_no_sense(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RankedList(**options)

"""RS@k against its formula and against the recall itself."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from dml import losses
from dml.losses.recall_surrogate import RecallSurrogate
from dml.pairs import Pairs
from tests.contracts.row_loss_contract import RowLossContract


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class TestRecallSurrogate(RowLossContract):
    def make(self) -> nn.Module:
        return losses.build("recall_surrogate", rank_temperature=0.2, recall_temperature=0.7, max_k=5)

    def row(self, s: Sequence[float], held: Sequence[float], pos: list[int], neg: list[int]) -> tuple[float, int]:
        if not pos:
            return 0.0, 0
        recalls = []
        for k in (1, 2, 4, 5):
            found = 0.0
            for i in pos:
                rank = 1 + sum(sigmoid((s[j] - s[i]) / 0.2) for j in pos + neg if j != i)
                found += sigmoid((k - rank) / 0.7)
            recalls.append(min(found, k) / min(k, len(pos)))
        return 1 - sum(recalls) / 4, 1


@pytest.mark.parametrize(("max_k", "ks"), [(16, (1, 2, 4, 8, 16)), (1, (1,)), (6.0, (1, 2, 4, 6)), (2, (1, 2))])
def test_the_ks_are_powers_of_two_and_the_last(max_k: float, ks: tuple[int, ...]) -> None:
    assert RecallSurrogate(max_k=max_k).ks == ks


def test_cold_temperatures_give_the_recall() -> None:
    """At half a rank beyond k, where no rank lies; there the steps of the sigmoids are sharp."""
    rows = torch.randn(40, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.arange(40) % 7
    loss = RecallSurrogate(rank_temperature=1e-7, recall_temperature=1e-3)
    loss.ks = tuple(k + 0.5 for k in loss.ks)  # type: ignore[assignment]
    pairs = Pairs.of(rows, labels)
    recalls = []
    for row, s in enumerate(pairs.similarity.tolist()):
        ranking = sorted((j for j in range(40) if j != row), key=lambda j, s=s: -s[j])
        same = [bool(labels[j] == labels[row]) for j in ranking]
        recalls += [sum(same[: int(k)]) / min(k, sum(same)) for k in loss.ks]
    assert float(loss(pairs)) == pytest.approx(1 - sum(recalls) / len(recalls), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_temperature": 0.0}, "temperatures must be above 0, got 0 and 1"),
        ({"recall_temperature": -1.0}, "temperatures must be above 0, got 0.01 and -1"),
        ({"max_k": 0}, "max_k must be a whole number of at least 1, got 0"),
        ({"max_k": 2.5}, "max_k must be a whole number of at least 1, got 2.5"),
    ],
)
def test_refuses_what_makes_no_sense(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecallSurrogate(**options)

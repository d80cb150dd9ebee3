"""Quadruplet loss against its formula; the second negative it draws is tested in tests/dml/test_tuples.py."""

import torch
from torch import Tensor, nn

from dml import losses
from dml.pairs import Pairs
from dml.tuples import Tuples, second_negative
from tests.contracts.loss_contract import LossContract
from tests.dml.losses.test_triplet import apart, hardest


class TestQuadruplet(LossContract):
    def make(self) -> nn.Module:
        return losses.build("quadruplet", margin=0.4, margin_second=0.3, miner="hardest")

    def oracle(self, loss: nn.Module, unit_ND: Tensor, labels_N: Tensor) -> float:
        tuples = hardest(unit_ND, labels_N)
        if not tuples:
            return 0.0
        columns = (torch.tensor(column) for column in zip(*tuples, strict=True))
        seconds, exists = second_negative(Pairs.of(unit_ND, labels_N), Tuples(*columns))
        total = 0.0
        for (a, p, n), m, there in zip(tuples, seconds.tolist(), exists.tolist(), strict=True):
            total += max(0.0, apart(unit_ND, a, p) - apart(unit_ND, a, n) + 0.4)
            if there:
                total += max(0.0, apart(unit_ND, a, p) - apart(unit_ND, n, m) + 0.3)
        return total / len(tuples)

    def test_order_of_the_batch_does_not_matter(self) -> None:
        """Where nothing is left to draw: one class has positives, and two other samples are the negatives."""
        loss = self.make().double()
        rows, known = self.batch([0, 0, 1, 2])
        order = torch.tensor([3, 1, 0, 2])
        torch.testing.assert_close(loss(Pairs.of(rows, known)), loss(Pairs.of(rows[order], known[order])))


def test_two_classes_leave_the_triplet_loss() -> None:
    rows, labels = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 2
    ours, triplet = (losses.build(name, miner="hardest") for name in ("quadruplet", "triplet"))
    torch.testing.assert_close(ours(Pairs.of(rows, labels)), triplet(Pairs.of(rows, labels)))

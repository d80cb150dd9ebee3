"""Angular loss against its formula and pytorch-metric-learning."""

import math

import torch
from pytorch_metric_learning import losses as theirs
from torch import Tensor, nn

from dml import losses
from dml.pairs import Pairs
from tests.contracts.loss_contract import DIM, LossContract, partners
from tests.dml.losses.test_n_pair import all_triplets


class TestAngular(LossContract):
    """Over all triplets, so that an anchor has several tuples, and none is drawn."""

    def make(self) -> nn.Module:
        loss = losses.build("angular", angle=40.0)
        loss.miner = all_triplets
        return loss

    def oracle(self, loss: nn.Module, unit_ND: Tensor, labels_N: Tensor) -> float:
        tan = math.tan(math.radians(40)) ** 2
        terms = []
        for a in range(len(labels_N)):
            positives, negatives = partners(labels_N, a)
            exponents = [
                4 * tan * float((unit_ND[a] + unit_ND[p]) @ unit_ND[n]) - 2 * (1 + tan) * float(unit_ND[a] @ unit_ND[p])
                for p in positives
                for n in negatives
            ]
            terms += [math.log(1 + sum(math.exp(x) for x in exponents))] if exponents else []
        return sum(terms) / max(1, len(terms))


def test_the_value_of_pytorch_metric_learning_where_anchors_have_one_positive() -> None:
    """It sums over the negatives of each positive pair, ours over all tuples of an anchor: with K = 2 the same.

    It normalises anchors and positives, but not negatives, so it is given unit vectors.
    """
    unit = nn.functional.normalize(torch.randn(12, DIM, dtype=torch.float64))
    labels = torch.arange(12) // 2
    ours = losses.build("angular")
    ours.miner = all_triplets
    torch.testing.assert_close(ours(Pairs.of(unit, labels)), theirs.AngularLoss(alpha=45)(unit, labels))

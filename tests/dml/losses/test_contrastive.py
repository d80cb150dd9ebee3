"""Contrastive loss over all pairs and over mined ones, against pytorch-metric-learning and the formula."""

import torch
from pytorch_metric_learning import losses as theirs
from torch import Tensor, nn

from dml import losses
from dml.pairs import Pairs
from tests.contracts.loss_contract import DIM, LossContract
from tests.dml.losses.test_triplet import apart, hardest


class TestMinedContrastive(LossContract):
    def make(self) -> nn.Module:
        return losses.build("contrastive", margin_pos=0.2, margin_neg=1.4, miner="hardest")

    def oracle(self, loss: nn.Module, unit_ND: Tensor, labels_N: Tensor) -> float:
        tuples = hardest(unit_ND, labels_N)
        pull = [apart(unit_ND, a, p) - 0.2 for a, p, _ in tuples]
        push = [1.4 - apart(unit_ND, a, n) for a, _, n in tuples]
        return sum(sum(x) / len(x) for x in ([x for x in pull if x > 0], [x for x in push if x > 0]) if x)


def test_the_value_of_pytorch_metric_learning_on_all_pairs_and_on_mined_ones() -> None:
    rows, labels = torch.randn(24, DIM, dtype=torch.float64), torch.arange(24) // 4
    other = theirs.ContrastiveLoss(pos_margin=0.3, neg_margin=1.2)
    pairs = Pairs.of(rows, labels)
    torch.testing.assert_close(losses.build("contrastive", margin_pos=0.3, margin_neg=1.2)(pairs), other(rows, labels))
    mined = losses.build("contrastive", margin_pos=0.3, margin_neg=1.2, miner="semihard")
    torch.testing.assert_close(mined(pairs), other(rows, labels, indices_tuple=mined.tuples(pairs)))

"""N-pair loss against its formula and pytorch-metric-learning."""

import math

import pytest
import torch
from pytorch_metric_learning import losses as theirs
from torch import Tensor, nn

from dml import losses
from dml.pairs import Pairs
from dml.tuples import Tuples
from tests.contracts.loss_contract import DIM, LossContract, partners, similar


def all_triplets(pairs: Pairs) -> Tuples:
    """Every (anchor, positive, negative), by loops."""
    found = []
    for a in range(len(pairs.rows)):
        positives, negatives = (mask[a].nonzero()[:, 0].tolist() for mask in (pairs.positives, pairs.negatives))
        found += [(a, p, n) for p in positives for n in negatives]
    columns = zip(*found, strict=True) if found else ((), (), ())
    return Tuples(*(torch.tensor(column, dtype=torch.int64) for column in columns))


class TestNPair(LossContract):
    """Over all triplets, so that an anchor has several tuples, and none is drawn."""

    def make(self) -> nn.Module:
        loss = losses.build("n_pair", scale=3.0)
        loss.miner = all_triplets
        return loss

    def oracle(self, loss: nn.Module, unit_ND: Tensor, labels_N: Tensor) -> float:
        terms = []
        for a in range(len(labels_N)):
            positives, negatives = partners(labels_N, a)
            exponents = [3 * (similar(unit_ND, a, n) - similar(unit_ND, a, p)) for p in positives for n in negatives]
            terms += [math.log(1 + sum(math.exp(x) for x in exponents))] if exponents else []
        return sum(terms) / max(1, len(terms))


def test_a_large_scale_does_not_overflow() -> None:
    loss = losses.build("n_pair", scale=1000.0)
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.01], [1.0, 0.01], [-1.0, 0.0]], requires_grad=True)
    value = loss(Pairs.of(rows, torch.tensor([0, 0, 1, 1])))
    value.backward()
    assert float(value.detach()) == pytest.approx(1000, rel=1e-3), "the negative is nearer by 2, or by 0"
    assert torch.isfinite(rows.grad).all()


def test_the_value_of_pytorch_metric_learning_on_its_own_pairs() -> None:
    """There each class has one anchor and one positive, and the other classes' positives are the negatives."""
    unit = nn.functional.normalize(torch.randn(10, DIM, dtype=torch.float64))
    labels = torch.arange(10) // 2
    first = torch.arange(0, 10, 2)
    pairs = (first, first + 1, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    ours = losses.build("n_pair")
    anchor, other = (x.flatten() for x in torch.meshgrid(first, first, indexing="ij"))
    kept = anchor != other
    ours.miner = lambda _: Tuples(anchor[kept], anchor[kept] + 1, other[kept] + 1)
    torch.testing.assert_close(ours(Pairs.of(unit, labels)), theirs.NPairsLoss()(unit, labels, indices_tuple=pairs))

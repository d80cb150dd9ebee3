"""Triplet loss against its formula and pytorch-metric-learning; what every tuple loss takes and refuses."""

import pytest
import torch
from pytorch_metric_learning import losses as theirs
from pytorch_metric_learning.reducers import MeanReducer
from torch import Tensor, nn

from dml import losses
from dml.config import LossConfig
from dml.losses.loss import TupleLoss
from dml.pairs import Pairs
from tests.contracts.loss_contract import DIM, LossContract, partners, similar

TUPLE_LOSSES = [name for name, cls in losses.LOSSES.items() if issubclass(cls, TupleLoss)]


def hardest(unit: Tensor, labels: Tensor) -> list[tuple[int, int, int]]:
    """Each anchor with its farthest positive and its nearest negative."""
    found = []
    for row in range(len(labels)):
        positives, negatives = partners(labels, row)
        if positives and negatives:
            found.append(
                (
                    row,
                    min(positives, key=lambda p: similar(unit, row, p)),
                    max(negatives, key=lambda n: similar(unit, row, n)),
                )
            )
    return found


def apart(unit: Tensor, a: int, b: int) -> float:
    return float((unit[a] - unit[b]).norm())


class TestTriplet(LossContract):
    def make(self) -> nn.Module:
        return losses.build("triplet", margin=0.4, miner="hardest")

    def oracle(self, loss: nn.Module, unit_ND: Tensor, labels_N: Tensor) -> float:
        terms = [max(0.0, apart(unit_ND, a, p) - apart(unit_ND, a, n) + 0.4) for a, p, n in hardest(unit_ND, labels_N)]
        return sum(terms) / max(1, len(terms))


def test_the_value_of_pytorch_metric_learning_on_the_same_triplets() -> None:
    """Its default reducer averages over the triplets above 0; the formula of ours is that of its MeanReducer."""
    rows, labels = torch.randn(24, DIM, dtype=torch.float64), torch.arange(24) // 4
    ours = losses.build("triplet", miner="random")
    pairs = Pairs.of(rows, labels, key=(0, 7))
    other = theirs.TripletMarginLoss(margin=0.2, reducer=MeanReducer())
    torch.testing.assert_close(ours(pairs), other(rows, labels, indices_tuple=ours.tuples(pairs)))


@pytest.mark.parametrize("name", TUPLE_LOSSES)
@pytest.mark.parametrize("rho", [0.3, 1.0])
def test_rho_keeps_every_tuple_loss_finite_where_the_anchor_is_its_own_positive(name: str, rho: float) -> None:
    """d(a, a) = 0 has no slope of its own; as a constant it has slope 0."""
    config = LossConfig(name=name, rho=rho, miner="random")
    loss = losses.from_config(config, num_classes=6, dim=DIM)
    noise = torch.randn(24, DIM, generator=torch.Generator().manual_seed(0))
    rows = (torch.arange(DIM) + noise).requires_grad_()
    value = loss(Pairs.of(rows, torch.arange(24) // 4))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(rows.grad).all()
    assert rows.grad.abs().max() > 0
    plain = losses.from_config(LossConfig(name=name, miner="random"), num_classes=6, dim=DIM)
    assert not torch.equal(plain(Pairs.of(rows, torch.arange(24) // 4)), value)


def test_rho_one_pushes_a_class_apart() -> None:
    """Every triplet is (a, a, p): the loss is the margin less the distance within the class, where that is smaller."""
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    loss = losses.build("triplet", margin=0.2, miner="random", rho=1.0)
    near = float((rows[0] - rows[1] / rows[1].norm()).norm())
    assert float(loss(Pairs.of(rows, torch.tensor([0, 0, 1, 1])))) == pytest.approx(0.2 - near, abs=1e-6)


@pytest.mark.parametrize("name", TUPLE_LOSSES)
def test_the_miner_and_rho_of_a_config_reach_every_tuple_loss(name: str) -> None:
    made = losses.from_config(LossConfig(name=name, miner="hardest", rho=0.25), num_classes=3, dim=4)
    assert type(made.miner).__name__ == "Hardest"
    assert made.rho == 0.25
    assert made.takes_memory


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"miner": "hard"}, r"unknown miner 'hard'; valid: hardest, .*semihard"),
        ({"options": {"rho": 0.1}}, r"loss.options.rho is no option; set loss.rho"),
        ({"options": {"margin": 2.1}}, r"margin is in \[0, 2\], got 2.1"),
        ({"name": "contrastive", "rho": 0.1}, r"rho rewrites mined tuples, but no miner is set; valid: random, "),
        ({"name": "quadruplet", "options": {"margin_second": -0.1}}, r"margin_second is in \[0, 2\], got -0.1"),
        ({"name": "margin", "options": {"beta": 3}}, r"beta is in \[0, 2\], got 3"),
        ({"name": "n_pair", "options": {"scale": 0}}, r"scale must be above 0, got 0"),
        ({"name": "angular", "options": {"angle": 90}}, r"angle is in degrees, above 0 and below 90, got 90"),
        ({"name": "snr_contrastive", "options": {"weight_mean": -1}}, r"weight_mean must be at least 0, got -1"),
        ({"name": "proxy_anchor", "rho": 0.1}, r"loss proxy_anchor mines no tuples: .* are for .*triplet"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses.from_config(LossConfig.model_validate({"name": "triplet"} | config), num_classes=3, dim=4)
    with pytest.raises(ValueError, match=r"rho is a probability in \[0, 1\], got 1.5"):
        losses.build("triplet", rho=1.5)

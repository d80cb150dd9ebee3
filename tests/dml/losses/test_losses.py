"""Each loss against its formula, written a second time with loops."""

import importlib
import math
from pathlib import Path

import pytest
from torch import Tensor, nn

from dml import losses
from dml.config import LossConfig
from tests.contracts.loss_contract import LossContract, partners, similar


class TestMultiSimilarity(LossContract):
    def make(self) -> nn.Module:
        return losses.build("multi_similarity")

    def oracle(self, loss: nn.Module, unit_ND: Tensor, labels_N: Tensor) -> float:
        total = 0.0
        for row in range(len(labels_N)):
            positives, negatives = partners(labels_N, row)
            s = [similar(unit_ND, row, other) for other in range(len(labels_N))]
            if not positives or not negatives:
                continue
            mined_p = [p for p in positives if s[p] < max(s[n] for n in negatives) + 0.1]
            mined_n = [n for n in negatives if s[n] > min(s[p] for p in positives) - 0.1]
            total += math.log(1 + sum(math.exp(-2 * (s[p] - 0.5)) for p in mined_p)) / 2
            total += math.log(1 + sum(math.exp(40 * (s[n] - 0.5)) for n in mined_n)) / 40
        return total / len(labels_N)


class TestContrastive(LossContract):
    def make(self) -> nn.Module:
        return losses.build("contrastive", margin_pos=0.2, margin_neg=1.4)

    def oracle(self, loss: nn.Module, unit_ND: Tensor, labels_N: Tensor) -> float:
        pull, push = [], []
        for row in range(len(labels_N)):
            positives, negatives = partners(labels_N, row)
            pull += [float((unit_ND[row] - unit_ND[p]).norm()) - 0.2 for p in positives]
            push += [1.4 - float((unit_ND[row] - unit_ND[n]).norm()) for n in negatives]
        return sum(
            sum(active) / len(active) for active in ([x for x in pull if x > 0], [x for x in push if x > 0]) if active
        )


def subclasses(cls: type) -> list[type]:
    return [found for child in cls.__subclasses__() for found in (child, *subclasses(child))]


def test_every_loss_has_a_contract_test() -> None:
    for file in Path(__file__).parent.glob("test_*.py"):
        importlib.import_module(f"tests.dml.losses.{file.stem}")
    tested = {type(found().make()) for found in subclasses(LossContract) if found.__name__.startswith("Test")}
    assert {name for name, cls in losses.LOSSES.items() if cls not in tested} == set()


def test_an_unknown_loss_is_named_with_the_nearest_first() -> None:
    with pytest.raises(ValueError, match="unknown loss 'multi_similarty'; valid: multi_similarity, "):
        losses.build("multi_similarty")


def test_an_unknown_option_is_named_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="unknown option of loss contrastive 'margin'; valid: margin_"):
        losses.build("contrastive", margin=1.0)


def test_a_loss_takes_exactly_what_it_needs() -> None:
    assert losses.LOSSES["proxy_anchor"].needs == {"num_classes", "dim"}
    with pytest.raises(ValueError, match="loss proxy_anchor needs dim, num_classes"):
        losses.build("proxy_anchor")
    made = losses.from_config(LossConfig(name="proxy_anchor", options={"alpha": 16}), num_classes=5, dim=3)
    assert made.proxies.shape == (5, 3)
    assert made.alpha == 16
    with pytest.raises(ValueError, match="known from the data and the encoder"):
        losses.from_config(LossConfig(name="proxy_anchor", options={"dim": 3}), num_classes=5, dim=3)

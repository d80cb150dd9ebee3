"""Each loss against its formula, written a second time with loops."""

import math

import pytest
import torch
from torch import Tensor, nn

from dml import losses
from dml.config import LossConfig
from dml.losses.tcm import TCM
from dml.pairs import Pairs
from tests.contracts.loss_contract import CLASSES, DIM, LossContract


def similar(unit: Tensor, a: int, b: int) -> float:
    return float(unit[a] @ unit[b])


def partners(labels: Tensor, row: int) -> tuple[list[int], list[int]]:
    others = [other for other in range(len(labels)) if other != row]
    return [o for o in others if labels[o] == labels[row]], [o for o in others if labels[o] != labels[row]]


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


class TestProxyAnchor(LossContract):
    def make(self) -> nn.Module:
        torch.manual_seed(3)
        return losses.build("proxy_anchor", num_classes=CLASSES, dim=DIM)

    def oracle(self, loss: nn.Module, unit_ND: Tensor, labels_N: Tensor) -> float:
        proxies = loss.proxies.detach() / loss.proxies.detach().norm(dim=1, keepdim=True)
        pulls, pushes = [], []
        for c in range(CLASSES):
            s = [float(row @ proxies[c]) for row in unit_ND]
            mine = [s[i] for i in range(len(s)) if labels_N[i] == c]
            rest = [s[i] for i in range(len(s)) if labels_N[i] != c]
            if mine:
                pulls.append(math.log(1 + sum(math.exp(-32 * (x - 0.1)) for x in mine)))
            pushes.append(math.log(1 + sum(math.exp(32 * (x + 0.1)) for x in rest)))
        return sum(pulls) / len(pulls) + sum(pushes) / len(pushes)


class TestTCM(LossContract):
    def make(self) -> nn.Module:
        return TCM(margin_pos=0.8, margin_neg=0.1, weight_pos=2.0, weight_neg=0.5)

    def oracle(self, loss: nn.Module, unit_ND: Tensor, labels_N: Tensor) -> float:
        pull, push = [], []
        for row in range(len(labels_N)):
            positives, negatives = partners(labels_N, row)
            pull += [0.8 - similar(unit_ND, row, p) for p in positives if similar(unit_ND, row, p) <= 0.8]
            push += [similar(unit_ND, row, n) - 0.1 for n in negatives if similar(unit_ND, row, n) >= 0.1]
        return 2.0 * (sum(pull) / len(pull) if pull else 0) + 0.5 * (sum(push) / len(push) if push else 0)

    def test_a_small_case_by_hand(self) -> None:
        # Hard are the positive pair (2, 3) at 0.707 and the two negative pairs of row 3.
        rows = torch.tensor([[0, 1], [0.43, 0.9], [1, 0], [0.5, 0.5]])
        tcm = TCM()
        assert float(tcm(Pairs.of(rows, torch.tensor([0, 0, 1, 1])))) == pytest.approx(0.518, abs=5e-4)
        assert {name: round(float(value), 3) for name, value in tcm.stats.items()} == {
            "tcm/positive": 0.193,
            "tcm/hard_positives": 0.5,
            "tcm/negative": 0.325,
            "tcm/hard_negatives": 0.5,
        }

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"margin_pos": 1.2}, r"margin_pos is a cosine similarity in \[-1, 1\], got 1.2"),
            ({"margin_pos": 0.2, "margin_neg": 0.4}, r"margin_neg \(0.4\) must not exceed margin_pos \(0.2\)"),
            ({"weight_neg": -1.0}, "weights must be at least 0"),
        ],
    )
    def test_refuses_what_makes_no_sense(self, options: dict[str, float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TCM(**options)


def test_every_loss_has_a_contract_test() -> None:
    tested = {"multi_similarity", "contrastive", "proxy_anchor"}
    assert set(losses.LOSSES) == tested


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

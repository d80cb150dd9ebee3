"""The regulariser against its formula, written a second time with loops."""

import pytest
import torch
from pytorch_metric_learning import losses as peer
from torch import Tensor, nn

from dml.losses.tcm import TCM
from dml.pairs import Pairs
from tests.contracts.loss_contract import DIM, LossContract, partners, similar


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

    def test_agrees_with_pytorch_metric_learning(self) -> None:
        ours, theirs = TCM(), peer.ThresholdConsistentMarginLoss()
        labels, found = torch.arange(24) % 6, []
        for call in (lambda x: ours(Pairs.of(x, labels)), lambda x: theirs(x, labels)):
            rows = torch.randn(6, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[labels]
            rows = rows + 0.4 * torch.randn(24, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            value = call(rows.requires_grad_())
            value.backward()
            found.append((value.detach(), rows.grad))
        assert ours.stats["tcm/hard_negatives"] > 0
        torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)

    def test_pairs_on_their_margin_count_as_hard_and_add_nothing(self) -> None:
        rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
        tcm = TCM(margin_pos=0.0, margin_neg=0.0)
        assert float(tcm(Pairs.of(rows, torch.tensor([0, 0, 1])))) == 0
        assert float(tcm.stats["tcm/hard_positives"]) == 1
        assert float(tcm.stats["tcm/hard_negatives"]) == 0.5

    def test_single_precision_gives_the_value_of_double(self) -> None:
        rows, labels = torch.randn(300, 64, dtype=torch.float64), torch.arange(300) // 4
        tcm = TCM(margin_neg=0.1)
        single, double = (tcm(Pairs.of(x, labels)).double() for x in (rows.float(), rows))
        torch.testing.assert_close(single, double, rtol=1e-6, atol=0)

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

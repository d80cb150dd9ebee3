"""What every loss in LOSSES, and TCM, must satisfy. A new loss inherits LossContract and gives `make` and `oracle`."""

import pytest
import torch
from torch import Tensor, nn

from dml.pairs import Pairs

CLASSES, DIM = 4, 8


def similar(unit: Tensor, a: int, b: int) -> float:
    return float(unit[a] @ unit[b])


def with_ids(labels: list[int], ids: list[int]) -> Tensor:
    """Labels that an oracle can tell from which samples the rows are."""
    known = torch.tensor(labels)
    known.ids = torch.tensor(ids)  # type: ignore[attr-defined]
    return known


def same_sample(labels: Tensor, row: int, other: int) -> bool:
    ids = getattr(labels, "ids", range(len(labels)))
    return bool(ids[row] == ids[other])


def partners(labels: Tensor, row: int) -> tuple[list[int], list[int]]:
    """The row's positives and its negatives."""
    others = [other for other in range(len(labels)) if not same_sample(labels, row, other)]
    return [o for o in others if labels[o] == labels[row]], [o for o in others if labels[o] != labels[row]]


class LossContract:
    """Subclasses give the loss and its slow oracle."""

    def make(self) -> nn.Module:
        raise NotImplementedError

    def oracle(self, loss: nn.Module, unit_ND: Tensor, labels_N: Tensor) -> float:
        """The formula in float64, by loops over samples."""
        raise NotImplementedError

    def batch(self, labels: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(len(labels), DIM, generator=generator, dtype=torch.float64)
        return rows.requires_grad_(), torch.tensor(labels)

    def check_formula(self, loss: nn.Module, rows: Tensor, labels: Tensor) -> None:
        rows = rows.detach()
        unit = rows / rows.norm(dim=1, keepdim=True)
        with torch.no_grad():
            value = float(loss(Pairs.of(rows, labels, ids_B=getattr(labels, "ids", None))))
        torch.testing.assert_close(value, self.oracle(loss, unit, labels), rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 0, 1, 2, 2], [3, 1, 3, 1, 3]])
    def test_equals_the_formula_on_balanced_and_ragged_batches(self, labels: list[int]) -> None:
        loss = self.make().double()
        for seed in range(5):
            self.check_formula(loss, *self.batch(labels, seed))

    def test_gradient_is_that_of_the_value(self) -> None:
        loss = self.make().double()
        rows, known = self.batch([0, 0, 1, 1, 2, 2])
        assert torch.autograd.gradcheck(lambda x: loss(Pairs.of(x, known)), (rows,), eps=1e-7, atol=1e-4)

    def test_order_of_the_batch_does_not_matter(self) -> None:
        loss = self.make().double()
        rows, known = self.batch([0, 0, 1, 1, 2, 2, 3, 3])
        order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(loss(Pairs.of(rows, known)), loss(Pairs.of(rows[order], known[order])))

    def test_length_of_the_embeddings_does_not_matter(self) -> None:
        loss = self.make().double()
        rows, known = self.batch([0, 0, 1, 1, 2, 2])
        scale = torch.linspace(0.5, 3, 6, dtype=torch.float64)[:, None]
        torch.testing.assert_close(loss(Pairs.of(rows, known)), loss(Pairs.of(rows * scale, known)))

    @pytest.mark.parametrize(
        "labels", [[0, 1, 2, 3], [1, 1, 1, 1], [2]], ids=["no positive", "one class only", "one sample"]
    )
    def test_batches_without_a_kind_of_pair_give_finite_gradients(self, labels: list[int]) -> None:
        loss = self.make().double()
        rows, known = self.batch(labels)
        value = loss(Pairs.of(rows, known))
        value.backward()
        assert torch.isfinite(value)
        assert rows.grad is not None, "a loss without any tuple must stay connected, else ranks dead-lock"
        assert torch.isfinite(rows.grad).all()
        for parameter in loss.parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all()

    @pytest.mark.parametrize("signs", [[1, 1, 1, 1, 1], [1, -1, 1, -1, 1]], ids=["identical", "opposite"])
    def test_embeddings_on_one_line_give_finite_gradients(self, signs: list[int]) -> None:
        loss = self.make()
        rows = torch.tensor(signs).float()[:, None].repeat(1, DIM).requires_grad_()
        loss(Pairs.of(rows, torch.tensor([0, 0, 1, 1, 2]))).backward()
        assert torch.isfinite(rows.grad).all()

    def test_one_class_that_fills_the_batch_gives_the_formula(self) -> None:
        loss = self.make().double()
        self.check_formula(loss, *self.batch([1] * 20 + [2, 3]))

    def test_a_sample_that_is_in_the_batch_twice_is_no_pair_with_itself(self) -> None:
        """Some anchors of each class then have one positive fewer, those of the second class none."""
        known = with_ids([0, 0, 0, 0, 1, 1, 2, 2, 3], [0, 1, 0, 2, 3, 3, 4, 5, 6])
        loss = self.make().double()
        for seed in range(3):
            rows, _ = self.batch([0] * 7, seed)
            self.check_formula(loss, rows[known.ids], known)

    def test_a_batch_whose_positives_are_all_copies_gives_finite_gradients(self) -> None:
        loss, ids = self.make().double(), torch.tensor([0, 0, 1, 1, 2, 2])
        rows, known = self.batch([0, 1, 2])
        value = loss(Pairs.of(rows[ids], known[ids], ids_B=ids))
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(rows.grad).all()

    def test_statistics_are_detached_numbers(self) -> None:
        loss = self.make()
        rows, known = self.batch([0, 0, 1, 1, 2, 2])
        loss(Pairs.of(rows.float(), known))
        for name, value in loss.stats.items():
            assert value.numel() == 1, name
            assert not value.requires_grad, name

    def test_stays_in_float32_under_autocast(self) -> None:
        loss = self.make()
        rows, known = self.batch([0, 0, 1, 1, 2, 2])
        rows = rows.detach().float()
        with torch.autocast("cpu", torch.bfloat16):
            inside = loss(Pairs.of(rows, known))
        torch.testing.assert_close(inside, loss(Pairs.of(rows, known)))

"""Soft ranks: what is saved, what is done in blocks, and that neither shows."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dml import losses
from dml.losses import soft_ranks as module
from dml.losses.soft_ranks import soft_ranks
from dml.pairs import Pairs


def pairs_of(labels: list[int] | Tensor, **options: Any) -> Pairs:
    known = torch.as_tensor(labels)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(len(known), 6, generator=generator, dtype=torch.float64).requires_grad_()
    return Pairs.of(rows, known, **options)


def test_a_small_case_by_hand() -> None:
    # Row 0 sees a positive at 0.8, another at 0.6, a negative at 0.7; differences of 0.1 are far at this temperature.
    angles = torch.tensor([1.0, 0.8, 0.6, 0.7], dtype=torch.float64).arccos()
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    ranks = soft_ranks(Pairs.of(rows, torch.tensor([0, 0, 0, 1])), temperature=1e-3)
    torch.testing.assert_close(ranks.above_pos_BK[0], torch.tensor([0.0, 1.0]).double())
    torch.testing.assert_close(ranks.above_neg_BK[0], torch.tensor([0.0, 1.0]).double())
    assert ranks.valid_BK.tolist() == [[True, True], [True, True], [True, True], [False, False]]


@pytest.mark.parametrize("block", [1, 200])
@pytest.mark.parametrize("name", ["smooth_ap", "recall_surrogate"])
def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch, name: str, block: int) -> None:
    labels = torch.arange(30) % 8
    found = []
    for size in (1 << 30, block):
        monkeypatch.setattr(module, "CACHED", size)
        pairs = pairs_of(labels)
        value = losses.build(name)(pairs)
        found.append((value, *torch.autograd.grad(value, pairs.rows)))
    for whole, in_blocks in zip(*found, strict=True):
        torch.testing.assert_close(in_blocks, whole)


@pytest.mark.parametrize("name", ["smooth_ap", "recall_surrogate"])
def test_what_waits_for_the_backward_is_a_few_similarity_matrices(name: str) -> None:
    """Nothing of B x K x N is kept, let alone B x N x N: 16 samples a class keep no more than 4 do, but for B x K."""

    def kept(samples: int) -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        pairs = pairs_of(torch.arange(128) // samples)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = losses.build(name)(pairs)
            total = sum(sizes.values())
        value.backward()
        return total

    matrix = 128 * 128 * 8
    assert kept(4) < 4 * matrix
    assert kept(16) < 4 * matrix + 128 * 15 * 8 * 5 * 8


def test_one_huge_class_among_single_samples() -> None:
    """Places are padded to the largest class; the padding of the others counts nowhere."""
    labels = [0] * 20 + list(range(1, 11))
    ranks = soft_ranks(pairs_of(labels), temperature=0.01)
    assert ranks.valid_BK.sum(1).tolist() == [19] * 20 + [0] * 10
    total_B = (ranks.above_pos_BK * ranks.valid_BK).sum(1)
    # Of each two positives one ranks before the other: 19 * 18 / 2.
    torch.testing.assert_close(total_B[:20], torch.full((20,), 171.0).double())


def test_no_rows_at_all() -> None:
    """A rank whose slice of the batch is empty has ranks of shape (0, 0) and takes part in the backward."""
    rows = torch.zeros(0, 6, requires_grad=True)
    for name in ("smooth_ap", "recall_surrogate"):
        losses.build(name)(Pairs.of(rows, torch.zeros(0, dtype=torch.int64), group=None)).backward()
        assert rows.grad is not None


def test_what_lies_far_below_weighs_nothing_but_is_not_subnormal() -> None:
    """At s of 1 and -1 and a temperature of 0.01 a sigmoid is e^-200, which float32 has not; gradients stay exact."""
    rows = torch.tensor([[1.0, 0], [1, 1e-3], [-1, 0], [-1, 1e-3]]).requires_grad_()
    pairs = Pairs.of(rows, torch.tensor([0, 0, 1, 1]))
    ranks = soft_ranks(pairs, temperature=0.01)
    assert float(ranks.above_neg_BK.detach().max()) < 1e-20
    (slope,) = torch.autograd.grad(ranks.above_neg_BK.sum(), pairs.similarity)
    tiny = torch.finfo(torch.float32).tiny
    assert ((slope == 0) | (slope.abs() >= tiny)).all()
    assert slope.abs().max() < 1e-18

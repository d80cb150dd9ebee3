"""Unit vectors and their similarities: values and gradients are those of plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dml.similarity import self_similarity, unit


def rows(count: int, dim: int = 5) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(count), dtype=torch.float64)


@pytest.mark.parametrize("count", [0, 1, 7, 64])
def test_values_and_gradients_are_those_of_autograd(count: int) -> None:
    weights, found = rows(count, count), []
    for call in (lambda x: self_similarity(unit(x)), lambda x: (e := F.normalize(x, dim=1)) @ e.T):
        leaf = rows(count).requires_grad_()
        value = call(leaf)
        (value * weights).sum().backward()
        found.append((value.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_values() -> None:
    leaf = rows(6).requires_grad_()
    assert torch.autograd.gradcheck(unit, (leaf,))
    assert torch.autograd.gradcheck(self_similarity, (leaf,))


def test_a_row_of_zeros_stays_one() -> None:
    assert torch.equal(unit(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    leaf = rows(4).requires_grad_()
    (first,) = torch.autograd.grad(self_similarity(unit(leaf)).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), leaf)

"""Unit vectors and their similarities, with backward passes that are cheaper than those autograd derives.

A loss over pairs costs little more than the products that its similarity matrix needs, so what stands around counts:
autograd derives a second product for the backward of e @ e.T, and some ten passes for that of e / |e|.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def unit(rows_BD: Tensor) -> Tensor:
    """The rows at unit length, as torch.nn.functional.normalize gives them: a row of zeros stays one.

    Args:
        rows_BD: floating (B, D).
    """
    found: Tensor = _Unit.apply(rows_BD)
    return found


def self_similarity(unit_BD: Tensor) -> Tensor:
    """The products of all rows with all rows, (B, B).

    Args:
        unit_BD: floating (B, D).
    """
    found: Tensor = _SelfSimilarity.apply(unit_BD)
    return found


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor) -> Tensor:
        length_B1 = rows_BD.norm(dim=1, keepdim=True).clamp(min=1e-12)
        unit_BD: Tensor = rows_BD / length_B1
        ctx.save_for_backward(unit_BD, length_B1)
        return unit_BD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        unit_BD, length_B1 = ctx.saved_tensors
        along_B1 = torch.linalg.vecdot(grads[0], unit_BD).unsqueeze(1)
        across_BD: Tensor = torch.addcmul(grads[0], unit_BD, along_B1, value=-1)
        return across_BD.div_(length_B1)


class _SelfSimilarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, unit_BD: Tensor) -> Tensor:
        ctx.save_for_backward(unit_BD)
        return unit_BD @ unit_BD.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # Rows and columns are the same tensor, so g @ e + g.T @ e is one product. Copied first, since an addition walks
        # along the transposed rows, which takes as long as the product when B is a power of two.
        unit_BD: Tensor = ctx.saved_tensors[0]
        found: Tensor = grads[0].T.contiguous().add_(grads[0]) @ unit_BD
        return found

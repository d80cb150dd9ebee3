"""What every metric asks of its input: finite, non-zero rows and integer labels; and float32 that is float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch

Array: TypeAlias = np.ndarray[Any, Any] | torch.Tensor
Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Counts: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


def unit_rows(embeddings_ND: Array, labels_N: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """Check embeddings and labels, and scale every row to unit length.

    Args:
        embeddings_ND: (N, D) floats of any width, NumPy or torch, on any device.
        labels_N: (N,) integers.

    Returns:
        rows (N, D), float64 for float64 input and float32 for any other, and labels (N,) int64, both on the embeddings'
        device and cut off from the graph.

    Raises:
        ValueError: shapes that differ, embeddings that are not floats, labels that are not integers, a row with NaN or
            infinity, a row of zeros, fewer than two classes, or no class with two samples.
    """
    rows_ND, labels = torch.as_tensor(embeddings_ND).detach(), torch.as_tensor(labels_N).detach()
    if rows_ND.ndim != 2 or labels.ndim != 1 or len(rows_ND) != len(labels):
        raise ValueError(
            "needs embeddings (N, D) and labels (N,) of one length, "
            f"got {tuple(rows_ND.shape)} and {tuple(labels.shape)}"
        )
    if not rows_ND.is_floating_point():
        raise ValueError(f"embeddings must be floats, got {rows_ND.dtype}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    labels = labels.to(rows_ND.device, torch.int64)
    counts_C = labels.unique(return_counts=True)[1]
    if len(counts_C) < 2:
        raise ValueError(f"needs at least two classes, got {len(counts_C)} in {len(labels)} samples")
    if counts_C.max() < 2:
        raise ValueError(f"needs a class with at least two samples, got {len(counts_C)} classes of one sample each")
    return _normalised(rows_ND if rows_ND.dtype == torch.float64 else rows_ND.float()), labels


def _normalised(rows_ND: torch.Tensor) -> torch.Tensor:
    # Dividing by the largest entry first keeps the squares of huge and tiny rows from overflowing and vanishing.
    largest_N1 = rows_ND.abs().amax(dim=1, keepdim=True)
    for wrong_N1, what in ((~largest_N1.isfinite(), "NaN or infinity"), (largest_N1 == 0, "only zeros")):
        if wrong_N1.any():
            where = wrong_N1.flatten().nonzero().flatten()
            raise ValueError(f"row {int(where[0])} of the embeddings holds {what} ({len(where)} such rows)")
    rows_ND = rows_ND / largest_N1
    return torch.nn.functional.normalize(rows_ND, dim=1)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in the precision of their operands, whatever a training loop has switched on.

    Autocast or TF32 would move similarities by 1e-3, which is more than the calibration range can bear.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False), torch.no_grad():
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision

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
    rows_ND, labels = _checked(embeddings_ND, labels_N, "embeddings")
    counts_C = labels.unique(return_counts=True)[1]
    if len(counts_C) < 2:
        raise ValueError(f"needs at least two classes, got {len(counts_C)} in {len(labels)} samples")
    if counts_C.max() < 2:
        raise ValueError(f"needs a class with at least two samples, got {len(counts_C)} classes of one sample each")
    return normalised(rows_ND, "embeddings"), labels


def query_gallery(
    queries_QD: Array, labels_Q: Array, gallery: tuple[Array, Array]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Check queries and a gallery, and scale every row to unit length.

    Args:
        queries_QD: (Q, D) floats of any width, NumPy or torch, on any device.
        labels_Q: (Q,) integers; a label that the gallery lacks is allowed, its queries have no positive.
        gallery: embeddings (G, D) and labels (G,), as above. No sample should be in both: nothing tells it from a pair.

    Returns:
        query rows (Q, D) and labels (Q,), gallery rows (G, D) and labels (G,): rows float64 where either side is, else
        float32, labels int64, all on the queries' device and cut off from the graph.

    Raises:
        ValueError: what `unit_rows` names of either side, dimensions that differ, a side without samples, no query
            with an item of its label in the gallery, or a gallery of one class.
    """
    if not isinstance(gallery, tuple | list) or len(gallery) != 2:
        raise ValueError(f"gallery must be (embeddings, labels), got {type(gallery).__name__}")
    rows_QD, labels = _checked(queries_QD, labels_Q, "queries")
    rows_GD, labels_G = _checked(*gallery, "gallery")
    if rows_QD.shape[1] != rows_GD.shape[1]:
        raise ValueError(f"queries have dimension {rows_QD.shape[1]}, the gallery has {rows_GD.shape[1]}")
    for rows_ND, side in ((rows_QD, "queries"), (rows_GD, "gallery")):
        if not len(rows_ND):
            raise ValueError(f"needs at least one sample on both sides, got none in the {side}")
    labels_G = labels_G.to(labels.device)
    if not torch.isin(labels, labels_G).any():
        raise ValueError(f"needs a query with a gallery item of its label, got none among {len(labels)} queries")
    if len(labels_G.unique()) < 2:
        raise ValueError(f"needs at least two classes in the gallery, got 1 in {len(labels_G)} samples")
    dtype = torch.promote_types(rows_QD.dtype, rows_GD.dtype)
    rows_QD, rows_GD = rows_QD.to(dtype), rows_GD.to(labels.device, dtype)
    return normalised(rows_QD, "queries"), labels, normalised(rows_GD, "gallery"), labels_G


def _checked(embeddings_ND: Array, labels_N: Array, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    rows_ND, labels = torch.as_tensor(embeddings_ND).detach(), torch.as_tensor(labels_N).detach()
    if rows_ND.ndim != 2 or labels.ndim != 1 or len(rows_ND) != len(labels):
        raise ValueError(
            f"needs {name} (N, D) and labels (N,) of one length, got {tuple(rows_ND.shape)} and {tuple(labels.shape)}"
        )
    if not rows_ND.is_floating_point():
        raise ValueError(f"{name} must be floats, got {rows_ND.dtype}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    return rows_ND, labels.to(rows_ND.device, torch.int64)


def normalised(rows_ND: torch.Tensor, name: str) -> torch.Tensor:
    """Rows at unit length: float64 stays, any other float becomes float32.

    Args:
        rows_ND: (N, D) floats.
        name: what messages call them.

    Raises:
        ValueError: a row with NaN or infinity, or of zeros.
    """
    rows_ND = rows_ND if rows_ND.dtype == torch.float64 else rows_ND.float()
    largest_N1 = torch.maximum(rows_ND.amax(dim=1, keepdim=True), -rows_ND.amin(dim=1, keepdim=True))
    for wrong_N1, what in ((~largest_N1.isfinite(), "NaN or infinity"), (largest_N1 == 0, "only zeros")):
        if wrong_N1.any():
            where = wrong_N1.flatten().nonzero().flatten()
            raise ValueError(f"row {int(where[0])} of the {name} holds {what} ({len(where)} such rows)")
    # Dividing by the largest entry first keeps the squares of huge and tiny rows from overflowing and vanishing.
    scaled_ND = rows_ND / largest_N1
    return scaled_ND.div_(torch.linalg.vector_norm(scaled_ND, dim=1, keepdim=True))


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

"""Cross-batch memory (XBM): embeddings of earlier batches as further columns for the losses that take them."""

import torch
from torch import Tensor, nn


class Memory(nn.Module):
    """A ring of detached embeddings with labels and ids, the same on all ranks.

    An encoder moves slowly, so that embeddings of some hundred steps ago still say where their samples lie ("slow
    drift"). They join the columns of a batch (`Pairs.extended`) and give each row thousands of pairs at the cost of one
    matrix product. It is filled with what was gathered over ranks, hence equal on all of them without a collective.

    Wang, Zhang, Huang and Scott, Cross-Batch Memory for Embedding Learning, CVPR 2020, arXiv 1912.06798. There the
    batch is enqueued before the loss and meets its own copy; here the batch's own columns carry gradients and its stale
    copies are dropped.

    Args:
        size: M, embeddings that are kept, at least 1.
        dim: D, dimension of the embedding.

    Attributes:
        embeddings: float32 (M, D), unit norm; 0 where nothing is kept yet.
        labels: int64 (M,), dense class indices.
        ids: int64 (M,), positions in the training split; -1 where nothing is kept yet.
        written: int64 (), embeddings ever added; the next goes to place written % M.
    """

    embeddings: Tensor
    labels: Tensor
    ids: Tensor
    written: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"size and dim must be at least 1, got {size} and {dim}")
        self.register_buffer("embeddings", torch.zeros(size, dim))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("ids", torch.full((size,), -1, dtype=torch.int64))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def add(self, embeddings_ND: Tensor, labels_N: Tensor, ids_N: Tensor) -> None:
        """Keeps a gathered batch in place of the oldest embeddings; of a batch beyond M, its last M.

        Args:
            embeddings_ND: floating (N, D), unit norm, in the same order on every rank.
            labels_N: int64 (N,).
            ids_N: int64 (N,), at least 0.
        """
        size, count = len(self.ids), len(ids_N)
        kept = slice(max(0, count - size), count)
        places = (self.written + torch.arange(count, device=self.ids.device)[kept]) % size
        self.embeddings[places] = embeddings_ND[kept].to(self.embeddings.dtype)
        self.labels[places] = labels_N[kept]
        self.ids[places] = ids_N[kept]
        self.written += count

"""Pairs: the one similarity matrix of a training step, shared by the loss and TCM.

Rows are this rank's embeddings, columns those of all ranks. `Pairs.of` gathers at once; everything lazy is local, so no
collective hides in an attribute that one rank might touch and another might not.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from dml import gather


@dataclass(frozen=True, eq=False)
class Pairs:
    """Local rows x gathered columns of one global batch. Made by `Pairs.of`.

    Attributes:
        rows: float32 (B, D), unit norm: this rank's embeddings.
        cols: float32 (N, D), unit norm: the embeddings of all ranks in rank order.
        row_labels: int64 (B,), dense class indices.
        col_labels: int64 (N,).
        row_offset: column of the first row: row i is column row_offset + i.
        group: the ranks that share this batch; None for one.
    """

    rows: Tensor
    cols: Tensor
    row_labels: Tensor
    col_labels: Tensor
    row_offset: int
    group: gather.Group | None

    @classmethod
    def of(
        cls,
        embeddings_BD: Tensor,
        labels_B: Tensor,
        *,
        group: gather.Group | Literal["auto"] | None = "auto",
    ) -> Self:
        """Normalises the rows in float32, also under autocast, and gathers rows and labels of all ranks.

        Args:
            embeddings_BD: floating (B, D), any norm but zero.
            labels_B: int64 (B,), class indices 0..C-1.
            group: "auto" takes all ranks of torch.distributed when there are several; None works on this rank alone.

        Raises:
            ValueError: shapes that do not fit, labels that are no integers.
        """
        if embeddings_BD.ndim != 2 or labels_B.shape != embeddings_BD.shape[:1]:
            raise ValueError(
                f"needs embeddings (B, D) and labels (B,), got {tuple(embeddings_BD.shape)} and {tuple(labels_B.shape)}"
            )
        if labels_B.is_floating_point():
            raise ValueError(f"labels must be integers, got {labels_B.dtype}")
        ranks = gather.default_group() if group == "auto" else group
        with torch.autocast(embeddings_BD.device.type, enabled=False):
            wide = torch.float64 if embeddings_BD.dtype == torch.float64 else torch.float32
            rows = F.normalize(embeddings_BD.to(wide), dim=1)
            counts = gather.row_counts(len(rows), ranks, rows.device)
            cols = gather.gather(rows, counts, ranks)
            col_labels = gather.gather(labels_B, counts, ranks)
        return cls(rows, cols, labels_B, col_labels, sum(counts[: gather.rank(ranks)]), ranks)

    @property
    def world(self) -> int:
        """W: ranks that share this batch."""
        return gather.world(self.group)

    @cached_property
    def similarity(self) -> Tensor:
        """Cosine similarity float32 (B, N) in [-1, 1], in full precision also under autocast."""
        with torch.autocast(self.rows.device.type, enabled=False):
            return self.rows @ self.cols.T

    @cached_property
    def _same(self) -> Tensor:
        return self.row_labels[:, None] == self.col_labels[None, :]

    @cached_property
    def positives(self) -> Tensor:
        """Bool (B, N): same class, another sample."""
        same = self._same.clone()
        same.diagonal(self.row_offset).fill_(False)
        return same

    @cached_property
    def negatives(self) -> Tensor:
        """Bool (B, N): another class."""
        return ~self._same

    def mean(self, local_sum: Tensor, local_count: Tensor | int) -> Tensor:
        """A mean over all ranks by the gradient rule of dml.gather: world * local_sum / global_count; 0 / 0 is 0.

        A collective: every rank must call it, in the same order.

        Args:
            local_sum: differentiable scalar, the sum over this rank's terms.
            local_count: how many terms that were.
        """
        count = torch.as_tensor(local_count, dtype=local_sum.dtype, device=local_sum.device)
        return self.world * local_sum / gather.sum_over_ranks(count, self.group).clamp(min=1)

"""Pairs: the one similarity matrix of a training step, shared by the loss and TCM.

Rows are this rank's embeddings, columns those of all ranks. `Pairs.of` gathers at once; everything lazy is local, so no
collective hides in an attribute that one rank might touch and another might not.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from dml import draws, gather
from dml.memory import Memory
from dml.similarity import self_similarity, unit


@dataclass(frozen=True, eq=False)
class Pairs:
    """Local rows x gathered columns of one global batch. Made by `Pairs.of`.

    Attributes:
        rows: float32 (B, D), unit norm: this rank's embeddings.
        cols: float32 (N, D), unit norm: the embeddings of all ranks in rank order.
        row_labels: int64 (B,), dense class indices.
        col_labels: int64 (N,).
        col_ids: int64 (N,), positions of the samples in the training split; None if they were not given.
        row_offset: column of the first row: row i is column row_offset + i.
        group: the ranks that share this batch; None for one.
        key: (seed, step), what `draws` depends on beside its stream and the global row.
        memory: earlier embeddings, the further columns of `extended`; None for none.
        counted: bool (N,), columns that are a positive or negative of some row; None for all.
        repeats: whether the batch may hold a sample more than once; never without ids.
    """

    rows: Tensor
    cols: Tensor
    row_labels: Tensor
    col_labels: Tensor
    col_ids: Tensor | None
    row_offset: int
    group: gather.Group | None
    key: tuple[int, int] = (0, 0)
    memory: Memory | None = None
    counted: Tensor | None = None
    repeats: bool = False
    _batch: "Pairs | None" = None

    @classmethod
    def of(
        cls,
        embeddings_BD: Tensor,
        labels_B: Tensor,
        *,
        ids_B: Tensor | None = None,
        key: tuple[int, int] = (0, 0),
        group: gather.Group | Literal["auto"] | None = "auto",
        memory: Memory | None = None,
        counts: list[int] | None = None,
    ) -> Self:
        """Normalises the rows in float32, also under autocast, and gathers rows, labels and ids of all ranks.

        Args:
            embeddings_BD: floating (B, D), any norm but zero.
            labels_B: int64 (B,), class indices 0..C-1.
            ids_B: int64 (B,), positions of the samples in the training split; given on all ranks or on none.
            key: (seed, step) of the draws of miners and rho; the same on all ranks.
            group: "auto" takes all ranks of torch.distributed when there are several; None works on this rank alone.
            memory: the same on all ranks; needs ids_B.
            counts: rows of each rank where they are known; asking the ranks makes the host wait for the device.

        Raises:
            ValueError: shapes that do not fit, labels or ids that are no integers, a memory without ids.
        """
        if embeddings_BD.ndim != 2 or labels_B.shape != embeddings_BD.shape[:1]:
            raise ValueError(
                f"needs embeddings (B, D) and labels (B,), got {tuple(embeddings_BD.shape)} and {tuple(labels_B.shape)}"
            )
        if ids_B is not None and ids_B.shape != labels_B.shape:
            raise ValueError(f"needs an id for each label, got {tuple(ids_B.shape)} and {tuple(labels_B.shape)}")
        for name, integers in (("labels", labels_B), ("ids", ids_B)):
            if integers is not None and integers.is_floating_point():
                raise ValueError(f"{name} must be integers, got {integers.dtype}")
        if memory is not None and ids_B is None:
            raise ValueError("a memory needs ids_B, by which it drops stale copies of the batch's own samples")
        ranks = gather.default_group() if group == "auto" else group
        with torch.autocast(embeddings_BD.device.type, enabled=False):
            wide = torch.float64 if embeddings_BD.dtype == torch.float64 else torch.float32
            rows = unit(embeddings_BD.to(wide))
        if counts is None or ranks is None:
            counts = gather.row_counts(len(rows), ranks, rows.device)
        known = torch.stack([labels_B] if ids_B is None else [labels_B, ids_B], dim=1)
        cols, known = gather.gather(rows, counts, ranks), gather.gather(known, counts, ranks)
        col_ids = None if ids_B is None else known[:, 1]
        # Only a CPU is asked: a GPU compares all pairs sooner than the host has its answer.
        repeats = col_ids is not None and (col_ids.device.type != "cpu" or len(set(col_ids.tolist())) < len(col_ids))
        return cls(
            rows=rows,
            cols=cols,
            row_labels=labels_B,
            col_labels=known[:, 0],
            col_ids=col_ids,
            row_offset=sum(counts[: gather.rank(ranks)]),
            group=ranks,
            key=key,
            memory=memory,
            repeats=repeats,
        )

    @property
    def world(self) -> int:
        """W: ranks that share this batch."""
        return gather.world(self.group)

    @cached_property
    def whole(self) -> "Pairs":
        """The batch as one rank would hold it: rows are the columns. Itself on one rank."""
        if self.world == 1:
            return self
        return replace(self, rows=self.cols, row_labels=self.col_labels, row_offset=0, group=None)

    @cached_property
    def extended(self) -> "Pairs":
        """The same rows; columns are those of the batch followed by the memory's. Itself without a memory.

        The memory's columns are detached. Its empty places, and its stale copies of samples that are in the batch, are
        neither positives nor negatives of any row: masked, so that shapes do not depend on them.
        """
        if self.memory is None:
            return self
        memory, ids = self.memory, self.memory.ids
        assert self.col_ids is not None  # `of` saw to it
        fresh = (ids >= 0) & ~torch.isin(ids, self.col_ids)
        return replace(
            self,
            cols=torch.cat([self.cols, memory.embeddings.to(self.cols.dtype)]),
            col_labels=torch.cat([self.col_labels, memory.labels]),
            col_ids=torch.cat([self.col_ids, ids]),
            counted=torch.cat([torch.ones_like(self.col_ids, dtype=torch.bool), fresh]),
            memory=None,
            _batch=self,
        )

    @cached_property
    def similarity(self) -> Tensor:
        """Cosine similarity float32 (B, N) in [-1, 1], in full precision also under autocast."""
        with torch.autocast(self.rows.device.type, enabled=False):
            if self.rows is self.cols:
                return self_similarity(self.rows)
            if self._batch is None:
                return self.rows @ self.cols.T
            further = self.cols[len(self._batch.cols) :]
            return torch.cat([self._batch.similarity, self.rows @ further.T], dim=1)

    def similarity_of(self, first_T: Tensor, second_T: Tensor) -> Tensor:
        """Cosine similarity (T,) of columns with columns, for what no row of this rank takes part in.

        Args:
            first_T: int64 (T,), columns.
            second_T: int64 (T,), columns.
        """
        # One product over the distinct columns is far cheaper than T pairs of vectors when T is some B x classes.
        distinct_U, place_T = first_T.unique(return_inverse=True)
        with torch.autocast(self.cols.device.type, enabled=False):
            return (self.cols[distinct_U] @ self.cols.T)[place_T, second_T]

    @cached_property
    def _same(self) -> Tensor:
        return self.row_labels[:, None] == self.col_labels[None, :]

    @cached_property
    def positives(self) -> Tensor:
        """Bool (B, N): same class, another sample."""
        same = self._same.clone() if self.counted is None else self._same & self.counted
        if self.repeats and self.col_ids is not None:
            row_ids = self.col_ids[self.row_offset : self.row_offset + len(self.rows)]
            return same.logical_and_(row_ids[:, None] != self.col_ids)
        same.diagonal(self.row_offset).fill_(False)
        return same

    @cached_property
    def negatives(self) -> Tensor:
        """Bool (B, N): another class."""
        return ~self._same if self.counted is None else ~self._same & self.counted

    def draws(self, stream: int, count: int) -> Tensor:
        """Uniform draws in [0, 1), float64 (B, count), that depend on (stream, key, global row, column) alone.

        So W ranks draw together what one would.

        Args:
            stream: keeps apart the draws of different purposes.
            count: draws a row; the first ones do not depend on it.
        """
        rows = np.arange(self.row_offset, self.row_offset + len(self.rows))
        return torch.from_numpy(draws.uniform(stream, *self.key, rows=rows, count=count)).to(self.rows.device)

    def mean(self, local_sum: Tensor, local_count: Tensor | int) -> Tensor:
        """A mean over all ranks by the gradient rule of dml.gather: world * local_sum / global_count; 0 / 0 is 0.

        A collective: every rank must call it, in the same order.

        Args:
            local_sum: differentiable scalar, the sum over this rank's terms.
            local_count: how many terms that were.
        """
        return local_sum * self.weight(torch.as_tensor(local_count, dtype=local_sum.dtype, device=local_sum.device))

    def weight(self, local_count: Tensor) -> Tensor:
        """The factor of one term in `mean`: world / global_count, 1 at least below the line. A collective.

        Args:
            local_count: floating, terms of this rank; of any shape, each count by itself.
        """
        return self.world / gather.sum_over_ranks(local_count, self.group).clamp(min=1)

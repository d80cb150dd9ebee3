"""Retrieval: are the nearest neighbours of a sample of its class?"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dml import gather
from dml.metrics.inputs import Array, Counts, Floats, query_gallery, unit_rows
from dml.metrics.neighbours import Gallery

_SHALLOW = 64  # lists so short that sorting queries by depth would save nothing


@dataclass(frozen=True, eq=False)
class Retrieval:
    """Retrieval measures of each query; `means` for the table, `per_class` for what hides in it."""

    labels_Q: Counts
    """(Q,) labels of the queries."""
    positives_Q: Counts
    """(Q,) R, gallery items of the query's label, itself left out; a query with 0 of them is left out."""
    values: dict[str, Floats]
    """By measure, (Q,) float64 in [0, 1], NaN for queries left out."""

    def means(self) -> dict[str, float]:
        """Mean of each measure over the queries that were asked, their number, and that of those left out."""
        asked_Q = self.positives_Q > 0
        means = {name: float(value_Q[asked_Q].mean()) for name, value_Q in self.values.items()}
        return means | _numbers(int(asked_Q.sum()), len(asked_Q))

    def per_class(self) -> tuple[Counts, dict[str, Floats]]:
        """Labels (C,), ascending, of the classes with a query that was asked, and by measure the mean of each (C,)."""
        asked_Q = self.positives_Q > 0
        labels_C, class_Q, sizes_C = np.unique(self.labels_Q[asked_Q], return_inverse=True, return_counts=True)
        return labels_C, {
            name: np.bincount(class_Q, weights=value_Q[asked_Q]) / sizes_C for name, value_Q in self.values.items()
        }


def retrieval(
    embeddings_ND: Array,
    labels_N: Array,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    gallery: tuple[Array, Array] | None = None,
    map_at: int | None = 1000,
    group: gather.Group | None = None,
) -> Retrieval:
    """Recall@K, Precision@1, R-precision, mAP@R and mAP@1000 of every sample, from one exact search.

    Neighbours are by cosine similarity in float32 (`dml.metrics.neighbours`). Without a gallery each sample is searched
    for among the others: never its own neighbour, however many duplicates it has. Equal similarities rank as the search
    returns them. R is the number of gallery items of the query's label, itself left out; a query with R = 0 cannot be
    answered and is left out, but stays in the gallery. With rel(i) = 1 where the i-th neighbour is of the query's label
    and P(i) the share of such among the first i:

        recall@K = 1 if any rel(i), i <= K         precision@1 = rel(1), which is recall@1
        r_precision = P(R)                         map@r = sum of P(i) rel(i) over i <= R, / R
        map@1000 = sum of P(i) rel(i) over i <= 1000, / min(R, 1000)

    so that a perfect ranking has 1 in each. mAP@R is that of Musgrave et al., "A Metric Learning Reality Check", ECCV
    2020, arXiv 2003.08505.

    Args:
        embeddings_ND: (N, D) floats of any width, NumPy or torch; the queries, and without `gallery` also the gallery.
        labels_N: (N,) integers.
        ks: the K of recall, each at least 1; beyond the gallery it means all of it.
        gallery: embeddings (G, D) and labels (G,) to search in instead.
        map_at: the depth of mAP@1000, which then is named by it; None spares that search.
        group: ranks that share the queries; every rank passes all rows and gets what one process would get, to the bit
            where they have as many threads.

    Raises:
        ValueError: bad input (`dml.metrics.inputs.unit_rows`, `query_gallery`), or a K or map_at that is no positive
            integer.
        ModuleNotFoundError: no faiss; it says which extra to install.
    """
    ks = _checked(ks)
    if map_at is not None and not _positive(map_at):
        raise ValueError(f"map_at must be a positive integer or None, got {map_at!r}")
    queries = _Queries.of(embeddings_ND, labels_N, gallery)
    measures: dict[str, Callable[[_Hits], Floats]] = {f"recall@{k}": partial(_Hits.recall, k=k) for k in ks}
    measures |= {"precision@1": partial(_Hits.recall, k=1), "r_precision": _Hits.r_precision}
    measures["map@r"] = _Hits.map_at_r
    if map_at is not None:
        measures[f"map@{map_at}"] = partial(_Hits.map_at, depth=map_at)
    depth_Q = queries.positives_Q.clamp(min=max(*ks, map_at or 1))
    values_MQ = queries.measure(depth_Q, list(measures.values()), group)
    return Retrieval(
        labels_Q=queries.labels_Q.numpy(),
        positives_Q=queries.positives_Q.numpy(),
        values=dict(zip(measures, values_MQ, strict=True)),
    )


def recall_at_k(
    embeddings_ND: Array,
    labels_N: Array,
    ks: Sequence[int] = (1, 2, 4, 8),
    *,
    gallery: tuple[Array, Array] | None = None,
    group: gather.Group | None = None,
) -> dict[str, float]:
    """Recall@K alone, which needs no deeper search than the largest K: what a training loop watches.

    Arguments, rules and errors are those of `retrieval`.

    Returns:
        {"recall@1": ..., "queries": samples asked, "queries_left_out": samples without another of their class}.
    """
    ks = _checked(ks)
    queries = _Queries.of(embeddings_ND, labels_N, gallery)
    depth_Q = torch.full_like(queries.positives_Q, max(ks))
    first_Q = queries.measure(depth_Q, [attrgetter("first")], group)[0]
    asked = int((queries.positives_Q > 0).sum())
    return {f"recall@{k}": int((first_Q < k).sum()) / asked for k in ks} | _numbers(asked, len(first_Q))


@dataclass(frozen=True, eq=False)
class _Hits:
    """The neighbours of a chunk of queries that are of their label, by query and best first."""

    query_H: Counts
    """Row of the chunk."""
    rank_H: Counts
    """Place among the query's neighbours, from 0."""
    nth_H: Counts
    """Which positive of its query it is, from 1."""
    positives_Q: Counts

    @classmethod
    def of(cls, relevant_QK: Tensor, positives_Q: Tensor) -> "_Hits":
        query_H, rank_H = (part.numpy() for part in relevant_QK.nonzero(as_tuple=True))
        counts_Q = np.bincount(query_H, minlength=len(relevant_QK))
        before_Q = counts_Q.cumsum() - counts_Q
        return cls(query_H, rank_H, np.arange(1, len(query_H) + 1) - before_Q[query_H], positives_Q.numpy())

    @cached_property
    def first(self) -> Floats:
        """Rank of the first, infinite where there is none."""
        first_Q = np.full(len(self.positives_Q), np.inf)
        best_H = self.nth_H == 1
        first_Q[self.query_H[best_H]] = self.rank_H[best_H]
        return first_Q

    def recall(self, k: int) -> Floats:
        return (self.first < k).astype(np.float64)

    @cached_property
    def precision(self) -> Floats:
        """Share of positives among the neighbours up to this one."""
        return self.nth_H / (self.rank_H + 1)

    @cached_property
    def among_first_r(self) -> npt.NDArray[np.bool_]:
        return self.rank_H < self.positives_Q[self.query_H]

    def r_precision(self) -> Floats:
        return self._sum(self.among_first_r) / self.positives_Q

    def map_at_r(self) -> Floats:
        return self._sum(self.precision * self.among_first_r) / self.positives_Q

    def map_at(self, depth: int) -> Floats:
        return self._sum(self.precision * (self.rank_H < depth)) / np.minimum(self.positives_Q, depth)

    def _sum(self, value_H: npt.NDArray[Any]) -> Floats:
        # bincount adds one by one in order, so that a query's sum does not depend on its place in the chunk.
        total_Q = np.bincount(self.query_H, weights=value_H, minlength=len(self.positives_Q))
        return total_Q.astype(np.float64, copy=False)


@dataclass(frozen=True, eq=False)
class _Queries:
    """Queries and the gallery that they are searched in."""

    rows_QD: Tensor
    labels_Q: Tensor
    positives_Q: Tensor
    gallery: Gallery
    labels_G: Tensor
    leave_one_out: bool

    @classmethod
    def of(cls, embeddings_ND: Array, labels_N: Array, gallery: tuple[Array, Array] | None) -> "_Queries":
        if gallery is None:
            rows_QD, labels_Q = unit_rows(embeddings_ND, labels_N)
            rows_QD = rows_GD = rows_QD.float()
            labels_G = labels_Q
        else:
            rows_QD, labels_Q, rows_GD, labels_G = query_gallery(embeddings_ND, labels_N, gallery)
        labels_Q, labels_G = labels_Q.cpu(), labels_G.cpu()
        labels_C, sizes_C = labels_G.unique(return_counts=True)
        at_Q = torch.searchsorted(labels_C, labels_Q.contiguous()).clamp(max=len(labels_C) - 1)
        positives_Q = torch.where(labels_C[at_Q] == labels_Q, sizes_C[at_Q] - int(gallery is None), 0)
        return cls(rows_QD, labels_Q, positives_Q, Gallery(rows_GD), labels_G, gallery is None)

    def measure(
        self, depth_Q: Tensor, measures: Sequence[Callable[[_Hits], Floats]], group: gather.Group | None
    ) -> Floats:
        """Each measure of each query (M, Q), NaN for those without a positive; ranks take every world-th chunk."""
        values_MQ = torch.zeros(len(measures), len(self.labels_Q), dtype=torch.float64)
        world, rank = gather.world(group), gather.rank(group)
        for number, ids in enumerate(self._chunks(depth_Q)):
            if number % world == rank:
                hits = self._search(ids, int(depth_Q[ids].max()))
                values_MQ[:, ids] = torch.from_numpy(np.stack([measure(hits) for measure in measures]))
        # Each query is measured by one rank and is 0 on the others, so that the sum is exact.
        values_MQ = gather.sum_over_ranks(values_MQ.to(self.rows_QD.device), group).cpu()
        values_MQ[:, self.positives_Q == 0] = math.nan
        return values_MQ.numpy()

    def _chunks(self, depth_Q: Tensor) -> Iterator[Tensor]:
        """Queries that have a positive, those of like depth together: one deep search must not deepen all others."""
        asked = self.positives_Q.nonzero()[:, 0]
        level_Q = depth_Q.clamp(_SHALLOW, max(_SHALLOW, len(self.gallery))).double().log2().ceil()[asked]
        for level in level_Q.unique():
            ids = asked[level_Q == level]
            at_once = self.gallery.queries_at_once(int(depth_Q[ids].max()))
            yield from ids.tensor_split(-(-len(ids) // at_once))  # even parts: faiss is slow for a few queries

    def _search(self, ids: Tensor, depth: int) -> _Hits:
        _, ids_QK = self.gallery.nearest(
            self.rows_QD[ids.to(self.rows_QD.device)], depth, ids if self.leave_one_out else None
        )
        return _Hits.of(self.labels_G[ids_QK] == self.labels_Q[ids, None], self.positives_Q[ids])


def _numbers(asked: int, queries: int) -> dict[str, float]:
    return {"queries": float(asked), "queries_left_out": float(queries - asked)}


def _checked(ks: Sequence[int]) -> tuple[int, ...]:
    if not ks or not all(_positive(k) for k in ks):
        raise ValueError(f"ks must be positive integers, got {ks!r}")
    return tuple(int(k) for k in ks)


def _positive(k: int) -> bool:
    return not isinstance(k, bool) and int(k) == k and k >= 1

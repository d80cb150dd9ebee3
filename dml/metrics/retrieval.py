"""Retrieval among the samples themselves: is a sample's nearest neighbour of its class?"""

from collections.abc import Sequence
from typing import Any

import torch

from dml.metrics.inputs import Array, unit_rows

CHUNK = 8192
"""Queries searched at a time; bounds the memory of their neighbour lists."""
_GPU_K = 2048


def recall_at_k(embeddings_ND: Array, labels_N: Array, ks: Sequence[int] = (1, 2, 4, 8)) -> dict[str, float]:
    """Recall@K, leave-one-out: the share of samples with one of their class among their K nearest others.

    Neighbours are exact, by inner product of the normalised rows in float32 (faiss, on the GPU when there is one). A
    sample is never its own neighbour, however many duplicates it has. Equal similarities rank as faiss returns them.
    Samples whose class has no second one cannot be answered: they stay in the gallery but are not asked.

    Args:
        embeddings_ND: (N, D) floats of any width, NumPy or torch.
        labels_N: (N,) integers.
        ks: the K of interest, each at least 1; beyond N - 1 it means all others.

    Returns:
        {"recall@1": ..., "queries": samples asked, "queries_left_out": samples of classes with one sample}.

    Raises:
        ValueError: bad input (see `dml.metrics.inputs.unit_rows`) or a K that is no positive integer.
        ModuleNotFoundError: no faiss; it says which extra to install.
    """
    if not ks or any(isinstance(k, bool) or int(k) != k or k < 1 for k in ks):
        raise ValueError(f"ks must be positive integers, got {ks!r}")
    rows_ND, labels = unit_rows(embeddings_ND, labels_N)
    rows_ND, labels = rows_ND.float().cpu().contiguous(), labels.cpu()
    _, class_N, sizes_C = labels.unique(return_inverse=True, return_counts=True)
    queries = (sizes_C[class_N] > 1).nonzero().view(-1)
    depth = min(max(ks), len(labels) - 1)
    search = _searcher(rows_ND, depth + 1)
    hits = dict.fromkeys(ks, 0)
    for ids in queries.split(CHUNK):
        rank = _rank_of_first_positive(search(rows_ND[ids]), ids, class_N)
        for k in hits:
            hits[k] += int((rank < min(k, depth)).sum())
    recalls = {f"recall@{int(k)}": hit / len(queries) for k, hit in hits.items()}
    return {**recalls, "queries": float(len(queries)), "queries_left_out": float(len(labels) - len(queries))}


def _rank_of_first_positive(neighbours_QK: torch.Tensor, ids_Q: torch.Tensor, class_N: torch.Tensor) -> torch.Tensor:
    """Position of the first neighbour of the query's class once the query itself is taken out by its id; K if none."""
    itself_QK = neighbours_QK == ids_Q[:, None]
    positive_QK = (class_N[neighbours_QK] == class_N[ids_Q, None]) & ~itself_QK
    first_Q = positive_QK.int().argmax(dim=1)
    itself_before_Q = itself_QK.cumsum(dim=1).gather(1, first_Q[:, None])[:, 0]
    return torch.where(positive_QK.any(dim=1), first_Q - itself_before_Q, neighbours_QK.shape[1])


def _searcher(rows_ND: torch.Tensor, depth: int) -> Any:
    """A function from queries (Q, D) to the ids (Q, depth) of their nearest rows."""
    faiss = _faiss()
    index = faiss.IndexFlatIP(rows_ND.shape[1])
    if faiss.get_num_gpus() and depth <= _GPU_K:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
    index.add(rows_ND.numpy())

    def search(queries_QD: torch.Tensor) -> torch.Tensor:
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(torch.get_num_threads())
        try:
            return torch.from_numpy(index.search(queries_QD.numpy(), depth)[1])
        finally:
            faiss.omp_set_num_threads(before)

    return search


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'recall needs faiss: pip install "onethreshold[cpu]", or "onethreshold[gpu]" for an NVIDIA GPU'
        ) from error
    return faiss

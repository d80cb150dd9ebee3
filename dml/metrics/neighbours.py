"""The nearest rows of a gallery, exactly: by faiss, or by whole rows of similarities where the lists are long.

faiss keeps the best of a list as it goes, which is next to free for short lists and slow for long ones. Beyond
FAISS_K neighbours the similarities of a query with the whole gallery are computed and partly sorted instead.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dml.metrics.inputs import full_precision

QUERIES = 4096
"""Queries searched at a time; as many as faiss takes into one matrix product."""
FAISS_K = 2048
"""Neighbours of a query, itself counted, that faiss is asked for at most; also its limit on a GPU."""
ENTRIES = 2**21
"""Similarities held at a time where whole rows are computed; bounds the memory of long lists."""
_SORTED = 2**19
_ID_BITS = 2**29 - 1  # what float64 has beyond float32


def nearest(
    queries_QD: Tensor, gallery_GD: Tensor, k: int, *, exclude_Q: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k rows of a gallery with the largest inner product with each query, best first.

    Exact, in float32. For unit rows (`dml.metrics.inputs.unit_rows`) the inner product is the cosine similarity. Equal
    similarities rank as the search returns them, which does not depend on any label.

    Args:
        queries_QD: (Q, D) floats on any device.
        gallery_GD: (G, D) floats on any device.
        k: neighbours of each query, at least 1; beyond the gallery it means all of it.
        exclude_Q: (Q,) integers, the gallery row that a query itself is and that must not be among its neighbours,
            however many duplicates it has; None when no query is in the gallery. `nearest(rows, rows, k,
            exclude_Q=torch.arange(len(rows)))` is leave-one-out.

    Returns:
        similarity (Q, K) float32 descending and ids (Q, K) int64, rows of the gallery, both on the CPU; K is the
        smaller of k and the gallery's size, less one where rows are excluded.

    Raises:
        ValueError: k below 1, or a gallery with no row to find.
        ModuleNotFoundError: no faiss; it says which extra to install.
    """
    gallery = Gallery(gallery_GD)
    at_once = gallery.queries_at_once(k)
    found = [
        gallery.nearest(queries_QD[at : at + at_once], k, None if exclude_Q is None else exclude_Q[at : at + at_once])
        for at in range(0, max(1, len(queries_QD)), at_once)
    ]
    return torch.cat([similarity for similarity, _ in found]), torch.cat([ids for _, ids in found])


class Gallery:
    """Rows to be searched more than once, for callers who divide the queries themselves.

    Args:
        rows_GD: (G, D) floats on any device; float32 rows are not copied.

    Raises:
        ModuleNotFoundError: no faiss; it says which extra to install.
    """

    def __init__(self, rows_GD: Tensor) -> None:
        self.rows_GD = rows_GD.detach().float().contiguous()
        self._faiss = import_faiss()
        self._gpus = self._faiss.get_num_gpus()

    def __len__(self) -> int:
        return len(self.rows_GD)

    def queries_at_once(self, k: int) -> int:
        """Queries whose search for k neighbours stays within a few hundred MB."""
        return max(1, min(QUERIES, ENTRIES // max(1, len(self)))) if self._whole_rows(k) else QUERIES

    def nearest(self, queries_QD: Tensor, k: int, exclude_Q: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the function `nearest` returns, by one search."""
        k_found = min(k, len(self) - (exclude_Q is not None))
        if k_found < 1:
            raise ValueError(f"k must be at least 1 in a gallery with a row to find, got k {k} of {len(self)} rows")
        search = self._by_rows if self._whole_rows(k_found) else self._by_faiss
        return search(queries_QD.detach().float(), k_found, exclude_Q)

    def _whole_rows(self, k: int) -> bool:
        return min(k, len(self)) >= FAISS_K or (self.rows_GD.is_cuda and not self._gpus)

    def _by_rows(self, queries_QD: Tensor, k: int, exclude_Q: Tensor | None) -> tuple[Tensor, Tensor]:
        device = self.rows_GD.device
        with full_precision(device):
            similarity_QG = queries_QD.to(device) @ self.rows_GD.T
        if exclude_Q is not None:
            similarity_QG.scatter_(1, exclude_Q.to(device)[:, None], torch.finfo(torch.float32).min)
        return _largest(similarity_QG, k)

    def _by_faiss(self, queries_QD: Tensor, k: int, exclude_Q: Tensor | None) -> tuple[Tensor, Tensor]:
        depth = k + (exclude_Q is not None)
        queries = np.ascontiguousarray(queries_QD.cpu().numpy())
        with threads_of_torch(self._faiss):
            if self._gpus:
                found = self._gpu_index.search(queries, depth)
            else:
                found = self._faiss.knn(queries, self.rows_GD.numpy(), depth, metric=self._faiss.METRIC_INNER_PRODUCT)
        similarity_QK, ids_QK = map(torch.from_numpy, found)
        if exclude_Q is None:
            return similarity_QK, ids_QK
        kept_QK = ids_QK != exclude_Q.cpu()[:, None]
        kept_QK[:, -1] &= ~kept_QK.all(dim=1)  # a query that duplicates have pushed out of its own list
        return similarity_QK[kept_QK].view(-1, k), ids_QK[kept_QK].view(-1, k)

    @cached_property
    def _gpu_index(self) -> Any:
        index = self._faiss.IndexFlatIP(self.rows_GD.shape[1])
        index = self._faiss.index_cpu_to_gpu(self._faiss.StandardGpuResources(), 0, index)
        index.add(self.rows_GD.cpu().numpy())
        return index


@contextmanager
def threads_of_torch(faiss: Any) -> Iterator[None]:
    """Faiss on as many threads as torch has."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _largest(similarity_QG: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and where they stand, descending, on the CPU."""
    if similarity_QG.is_cuda:
        values, ids = similarity_QG.topk(k, dim=1)
        return values.cpu(), ids.cpu()
    blocks = similarity_QG.split(max(1, _SORTED // similarity_QG.shape[1]))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found = list(pool.map(lambda block: _largest_keys(block, k), blocks))
    keys_QK = torch.cat(found)
    bits_QK = keys_QK.view(torch.int64)
    ids_QK = similarity_QG.shape[1] - 1 - (bits_QK & _ID_BITS)
    bits_QK.bitwise_and_(~_ID_BITS)
    return keys_QK.float(), ids_QK


def _largest_keys(similarity_QG: Tensor, k: int) -> Tensor:
    # NumPy sorts values several times faster than it or torch sorts values with their places, so that the places
    # travel in the bits of a float64 which a float32 leaves zero.
    g = similarity_QG.shape[1]
    keys_QG = similarity_QG.double()
    keys_QG.view(torch.int64).bitwise_or_(torch.arange(g - 1, -1, -1))
    keys = keys_QG.numpy()
    if k < g:
        keys.partition(g - k, axis=1)
    keys = keys[:, g - k :]
    keys.sort(axis=1)
    return torch.from_numpy(keys[:, ::-1].copy())


def import_faiss() -> Any:
    """The faiss module; without it, ModuleNotFoundError that says which extra to install."""
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'this needs faiss: pip install "onethreshold[cpu]", or "onethreshold[gpu]" for an NVIDIA GPU'
        ) from error
    return faiss

"""Nearest rows by inner product: exactly, or past a size by an inverted file whose recall is measured.

The rows lie dense in one array. A small gallery is searched row by row, a large one through faiss's inverted file of
8-bit codes (which takes a quarter of the rows' memory again), whose candidates are then compared exactly. HNSW finds as
well, but cannot forget: galleries change (benchmarks/gallery_search.py has the figures).
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dml.metrics.neighbours import import_faiss
from serve.gallery.lock import SharedLock

Rows = npt.NDArray[np.float32]
Slots = npt.NDArray[np.int64]

EXACT_UP_TO = 50_000
"""Rows of a gallery that is searched exactly: beyond it that takes longer than the way to the service."""
RECALL, RECALL_K = 0.99, 10
"""Share of the true nearest that the inverted file must find, and how many nearest it is measured on.

A search for more is exact: beyond a row's own class all are alike, and a quarter of the lists does not find enough.
"""
_SPARE = 32  # candidates beyond the neighbours asked for, since 8-bit codes mix up the order of near ones
_SAMPLE = 256  # rows that the recall is measured on
_LISTS = 2048  # at most: with more, a million rows would take minutes to be sorted into them
_TRAINING, _ROUNDS = 40, 6  # rows a list that the lists' centres are learnt from by k-means, and its rounds
_CHUNK = 8192  # rows put into the lists at a time, between which writers get their turn


@dataclass(frozen=True)
class IndexReport:
    """How a gallery is searched.

    Attributes:
        kind: flat (exact), gpu (exact, on a GPU) or ivf (inverted file).
        lists: of the inverted file; 0 for an exact search.
        probes: lists that a search looks into.
        recall: share of the RECALL_K nearest rows, found by an exact search, that this one finds; 1 when exact.
        measured_on: rows whose neighbours it was measured on; 0 when exact.
    """

    kind: Literal["flat", "gpu", "ivf"]
    lists: int = 0
    probes: int = 0
    recall: float = 1.0
    measured_on: int = 0


class Index:
    """Rows by slot 0..n-1, and the search among them.

    Callers hold the lock: shared to search, alone to change; `build` takes it itself, a short while at a time.

    Args:
        dim: D.
        lock: of the gallery.
        exact_up_to: rows that are searched exactly.
    """

    def __init__(self, dim: int, lock: SharedLock, *, exact_up_to: int = EXACT_UP_TO) -> None:
        self._faiss = import_faiss()
        self._lock = lock
        self._exact_up_to = exact_up_to
        self._rows: Rows = np.empty((0, dim), np.float32)
        self._count = 0
        self._gpus = int(self._faiss.get_num_gpus())
        self._gpu: Any = None
        self._gpu_lock = threading.Lock()
        self._ivf: Any = None
        self._tried = 0
        self._entered = 0
        self._report = IndexReport("gpu" if self._gpus else "flat")
        self._missed: set[int] | None = None

    def __len__(self) -> int:
        return self._count

    @property
    def rows(self) -> Rows:
        """(n, D), a view."""
        return self._rows[: self._count]

    @property
    def report(self) -> IndexReport:
        """How it is searched now."""
        return self._report

    @property
    def stale(self) -> bool:
        """Whether `build` would help: too many for the exact search, and as many have come as there were before."""
        return not self._gpus and self._count > self._exact_up_to and self._entered >= self._tried

    def put(self, slots: Sequence[int], rows_BD: Rows) -> None:
        """Sets rows of unit norm; new ones have the slots n, n + 1, ... in this order, and no slot comes twice."""
        before = self._count
        self._count = max(before, 1 + max(slots, default=-1))
        self._grow()
        self._rows[slots] = rows_BD
        self._entered += len(slots)
        self._forget([slot for slot in slots if slot < before])
        self._enter(slots)

    def remove(self, slot: int) -> None:
        """Drops a row; the last one takes its slot."""
        last = self._count - 1
        self._forget([slot, last])
        self._rows[slot] = self._rows[last]
        self._count = last
        if slot != last:
            self._enter([slot])
        if self._report.kind == "ivf" and self._count < self._exact_up_to // 2:
            self._ivf, self._tried, self._report = None, 0, IndexReport("flat")

    def search(self, query_D: Rows, k: int) -> tuple[npt.NDArray[np.float64], Slots]:
        """Euclidean distances (K,), ascending, and the slots (K,) of the nearest rows; K is at most k and n."""
        k = min(k, self._count)
        if k == 0:
            return np.empty(0), np.empty(0, np.int64)
        slots = np.empty(0, np.int64)
        if self._report.kind == "ivf" and k <= RECALL_K:
            slots = _candidates(self._faiss, self._ivf, query_D[None], k + _SPARE, self._report.probes)[0]
            slots = slots[slots >= 0]
        if len(slots) < k:  # more were asked for, or the lists that were looked into hold fewer
            slots = self._on_gpu(query_D, k) if self._gpus else self._exact(query_D[None], k)[0]
        # From the differences: 2 - 2 s has lost the digits of small distances.
        distances = np.linalg.norm(self._rows[slots].astype(np.float64) - query_D, axis=1)
        order = np.lexsort((slots, distances))[:k]
        return distances[order], slots[order]

    def build(self, threads: int = 1) -> None:
        """Learns and fills an inverted file, measures it, and searches by it from then on where that is worth it."""
        self._faiss.omp_set_num_threads(threads)
        with self._lock.shared():
            count = self._count
            lists = max(1, min(_LISTS, round(4 * count**0.5)))
            rng = np.random.default_rng(0)
            training = self.rows[rng.choice(count, min(count, _TRAINING * lists), replace=False)]
            sample = rng.choice(count, min(count, _SAMPLE), replace=False)
            self._missed = set()
        ivf = _inverted_file(self._faiss, training, lists)
        for start in range(0, count, _CHUNK):
            with self._lock.shared():
                part = np.arange(start, min(start + _CHUNK, self._count))
                ivf.add_with_ids(self._rows[part], part)
        with self._lock.alone():
            changed, self._missed = sorted(self._missed), None
            self._tried, self._entered = count, 0
            self._ivf = ivf
            self._forget(changed)
            self._enter([slot for slot in changed if slot < self._count])
        with self._lock.shared():  # from here on it follows all changes, and is not searched yet
            report = self._measured(ivf, lists, sample[sample < self._count])
        with self._lock.alone():
            if report.kind == "ivf" and self._count >= self._exact_up_to // 2:
                self._report = report
            else:
                self._ivf = None

    def _measured(self, ivf: Any, lists: int, sample: Slots) -> IndexReport:
        """With the fewest probes that find enough; flat where a quarter of the lists would not be enough."""
        k = min(RECALL_K, self._count - 1)
        queries = self._rows[sample]
        truth = [set(row) - {own} for row, own in zip(self._exact(queries, k + 1), sample, strict=True)]
        probes = 1
        while probes <= max(1, lists // 4):
            candidates = _candidates(self._faiss, ivf, queries, k + 1 + _SPARE, probes)
            # What is among the candidates is found: they are compared exactly.
            hits = sum(len(true & set(row)) for true, row in zip(truth, candidates, strict=True))
            recall = hits / max(1, sum(map(len, truth)))
            if recall >= RECALL:
                return IndexReport("ivf", lists, probes, recall, len(sample))
            probes *= 2
        return IndexReport("flat")

    def _exact(self, queries_QD: Rows, k: int) -> Slots:
        found: Slots
        _, found = self._faiss.knn(queries_QD, self.rows, k, metric=self._faiss.METRIC_INNER_PRODUCT)
        return found

    def _on_gpu(self, query_D: Rows, k: int) -> Slots:
        with self._gpu_lock:  # faiss on a GPU answers one caller at a time
            if self._gpu is None:
                flat = self._faiss.IndexFlatIP(self._rows.shape[1])
                self._gpu = self._faiss.index_cpu_to_gpu(self._faiss.StandardGpuResources(), 0, flat)
                self._gpu.add(self.rows)
            found: Slots = self._gpu.search(query_D[None], k)[1][0]
        return found

    def _grow(self) -> None:
        if self._count > len(self._rows):
            # Memory that no row has touched yet is not taken from the machine.
            larger = np.empty((max(1024, 2 * self._count), self._rows.shape[1]), np.float32)
            larger[: len(self._rows)] = self._rows
            self._rows = larger

    def _forget(self, slots: Sequence[int]) -> None:
        """Takes rows that change or go out of what was made of them."""
        self._gpu = None
        if self._missed is not None:
            self._missed.update(slots)
        if self._ivf is not None and slots:
            chosen = np.unique(np.asarray(slots, dtype=np.int64))
            self._ivf.remove_ids(self._faiss.IDSelectorArray(chosen))

    def _enter(self, slots: Sequence[int]) -> None:
        if self._missed is not None:
            self._missed.update(slots)
        if self._ivf is not None and slots:
            chosen = np.asarray(slots, dtype=np.int64)
            self._ivf.add_with_ids(self._rows[chosen], chosen)


def _inverted_file(faiss: Any, training: Rows, lists: int) -> Any:
    dim = training.shape[1]
    quantizer = faiss.IndexFlatIP(dim)
    ivf = faiss.IndexIVFScalarQuantizer(
        quantizer, dim, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    ivf.cp.niter = _ROUNDS
    ivf.cp.min_points_per_centroid = 1  # it would warn of small tests
    ivf.train(training)
    # By which rows are found again when they are replaced or removed.
    ivf.set_direct_map_type(faiss.DirectMap.Hashtable)
    return ivf


def _candidates(faiss: Any, ivf: Any, queries_QD: Rows, most: int, probes: int) -> Slots:
    """Slots (Q, most), -1 where the lists that were looked into hold fewer."""
    # faiss.contrib.torch_utils, wherever it is imported, puts a search without params in the place of faiss's own.
    search = getattr(ivf, "search_numpy", ivf.search)
    found: Slots
    _, found = search(queries_QD, most, params=faiss.SearchParametersIVF(nprobe=probes))
    return found

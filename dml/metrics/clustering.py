"""Do clusters that are found without labels agree with the classes?"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dml.metrics.inputs import Array, Counts, Floats, full_precision, unit_rows
from dml.metrics.neighbours import import_faiss, threads_of_torch

BATCH = 256
"""Rows drawn at a time for the first centres of k-means."""
ALIKE = 1e-5
"""Squared distances below this are rounding in float32: the rows are the same."""


def clustering(
    embeddings_ND: Array,
    labels_N: Array,
    *,
    k: int | None = None,
    seed: int = 0,
    iterations: int = 20,
    restarts: int = 1,
) -> dict[str, float]:
    """Cluster the embeddings by k-means and compare the clusters with the classes.

    Args:
        embeddings_ND: (N, D) floats of any width, NumPy or torch; rows are normalised.
        labels_N: (N,) integers.
        k: clusters; the number of classes among these labels when None.
        seed: of the first centres.
        iterations: of k-means.
        restarts: runs from other first centres, of which the one with the smallest sum of squares counts.

    Returns:
        nmi, ami and f1 of `agreement`, and clusters, the k that was asked for.

    Raises:
        ValueError: bad input (see `dml.metrics.inputs.unit_rows`), or a k that is not in 1..N.
        ModuleNotFoundError: no faiss; it says which extra to install.
    """
    rows_ND, labels = unit_rows(embeddings_ND, labels_N)
    k = len(labels.unique()) if k is None else k
    clusters_N = k_means(rows_ND, k, seed=seed, iterations=iterations, restarts=restarts)
    return {**agreement(labels, clusters_N), "clusters": float(k)}


def k_means(rows_ND: torch.Tensor, k: int, *, seed: int = 0, iterations: int = 20, restarts: int = 1) -> Counts:
    """Clusters by k-means in Euclidean distance on all rows (faiss, on the GPU when there is one).

    The centres are plain means, not scaled to unit length, as in the published figures; the first are drawn by
    `first_centres`, for k-means from rows drawn blindly misses classes that stand well apart. On the CPU the same seed,
    rows and number of threads give the same clusters; on a GPU sums may be added in another order.

    Args:
        rows_ND: (N, D) floats, finite.
        k: clusters, 1 to N.
        seed: of the first centres.
        iterations: assignments and moves, fewer when nothing moves any more.
        restarts: runs, of which the one with the smallest sum of squares counts.

    Returns:
        (N,) int64 in 0..k-1. A cluster may be empty when fewer than k rows differ.

    Raises:
        ValueError: a k, iterations or restarts that cannot be.
        ModuleNotFoundError: no faiss; it says which extra to install.
    """
    if not 1 <= k <= len(rows_ND):
        raise ValueError(f"k must be from 1 to the number of samples, {len(rows_ND)}, got {k}")
    if iterations < 1 or restarts < 1:
        raise ValueError(f"iterations and restarts must be at least 1, got {iterations} and {restarts}")
    faiss = import_faiss()
    rows_ND = rows_ND.detach().float()
    rows = rows_ND.cpu().contiguous().numpy()
    best, clusters_N = np.inf, np.zeros(len(rows), dtype=np.int64)
    for run in range(restarts):
        means = faiss.Kmeans(
            rows.shape[1],
            k,
            niter=iterations,
            min_points_per_centroid=1,
            max_points_per_centroid=len(rows),
            gpu=min(1, faiss.get_num_gpus()),
        )
        with threads_of_torch(faiss):
            means.train(rows, init_centroids=rows[first_centres(rows_ND, k, seed=(seed, run))])
            squared_N, found_N = means.assign(rows)
        squares = float(squared_N.astype(np.float64).sum())
        if squares < best:
            best, clusters_N = squares, found_N.astype(np.int64)
    return clusters_N


def first_centres(rows_ND: torch.Tensor, k: int, *, seed: int | Sequence[int] = 0) -> Counts:
    """Draws k rows that lie far apart to start k-means from, by k-means++.

    The first is any row; each other has a chance in proportion to its squared distance to the nearest before it. Arthur
    and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007.

    Rows are drawn many at a time from the chances that held before the batch, and each is kept with the share of its
    squared distance that those kept earlier in the batch have left it. Such rejection leaves the distribution what it
    is one by one, but the distances cost few large matrix products in place of k small ones.

    Args:
        rows_ND: (N, D) unit rows, float32.
        k: rows to draw, 1 to N.
        seed: of the draws.

    Returns:
        (k,) int64, different rows; once all others equal one that is drawn, the rest are drawn blindly.
    """
    rng = np.random.default_rng(seed)
    chosen = [int(rng.integers(len(rows_ND)))]
    with full_precision(rows_ND.device):
        squared_N = _squared_distances(rows_ND @ rows_ND[chosen[0]])
        while len(chosen) < k:
            mass_N = squared_N.double().cumsum(dim=0).cpu().numpy()
            if mass_N[-1] == 0:
                others = np.setdiff1d(np.arange(len(rows_ND)), chosen)
                chosen += rng.choice(others, k - len(chosen), replace=False).tolist()
                break
            drawn_B = np.searchsorted(mass_N, rng.random(BATCH) * mass_N[-1], side="right").clip(max=len(mass_N) - 1)
            rows_BD = rows_ND[torch.from_numpy(drawn_B).to(rows_ND.device)]
            before_B = squared_N[torch.from_numpy(drawn_B).to(rows_ND.device)].cpu().numpy()
            kept = _kept(before_B, _squared_distances(rows_BD @ rows_BD.T).cpu().numpy(), rng)[: k - len(chosen)]
            chosen += drawn_B[kept].tolist()
            squared_N = squared_N.minimum(_squared_distances((rows_ND @ rows_BD[kept].T).amax(dim=1)))
    return np.array(chosen, dtype=np.int64)


def _kept(before_B: Any, between_BB: Any, rng: np.random.Generator) -> list[int]:
    left_B, kept = before_B, []
    for draw, luck in enumerate(rng.random(len(before_B))):
        if luck * before_B[draw] < left_B[draw]:
            kept.append(draw)
            left_B = np.minimum(left_B, between_BB[draw])
    return kept


def _squared_distances(similarity: torch.Tensor) -> torch.Tensor:
    squared = 2 - 2 * similarity
    return squared.masked_fill_(squared < ALIKE, 0)


def agreement(labels_N: Array, clusters_N: Array) -> dict[str, float]:
    """How far a clustering and the classes are the same partition, whatever the clusters are called.

    Args:
        labels_N: (N,) integers, the class of each sample.
        clusters_N: (N,) integers, the cluster of each sample.

    Returns:
        nmi: mutual information over the arithmetic mean of the two entropies, in [0, 1]. It grows with the number of
            clusters even when they are drawn blindly.
        ami: the same with the mutual information of blind clusters of these sizes taken off above and below: 0 by
            chance, 1 for the same partition; below 0 when worse than chance. Vinh, Epps and Bailey, "Information
            Theoretic Measures for Clusterings Comparison", JMLR 2010.
        f1: harmonic mean of pairwise precision (of the pairs of one cluster, the share of one class) and recall (of the
            pairs of one class, the share in one cluster), in [0, 1]. 0 when no pair shares both; 1 when neither has a
            pair.

    Raises:
        ValueError: lengths that differ, or no samples.
    """
    labels, clusters = torch.as_tensor(labels_N).cpu(), torch.as_tensor(clusters_N).cpu()
    if labels.ndim != 1 or labels.shape != clusters.shape or not len(labels):
        raise ValueError(
            f"needs labels and clusters (N,) of one length, got {tuple(labels.shape)} and {tuple(clusters.shape)}"
        )
    class_N, sizes_C = labels.unique(return_inverse=True, return_counts=True)[1:]
    cluster_N, sizes_K = clusters.unique(return_inverse=True, return_counts=True)[1:]
    cells_M, counts_M = (class_N * len(sizes_K) + cluster_N).unique(return_counts=True)
    shared_M, classes_C, clusters_K = counts_M.numpy(), sizes_C.numpy(), sizes_K.numpy()
    joined_M = classes_C[cells_M // len(sizes_K)] * clusters_K[cells_M % len(sizes_K)].astype(np.float64)
    n = len(labels)
    information = float((shared_M / n * np.log(n * shared_M / joined_M)).sum())
    entropy = (_entropy(classes_C) + _entropy(clusters_K)) / 2
    if len(classes_C) == len(clusters_K) == len(shared_M):  # one partition: no chance, no 0 / 0
        return {"nmi": 1.0, "ami": 1.0, "f1": 1.0}
    chance = expected_information(classes_C, clusters_K)
    return {
        "nmi": max(information / entropy, 0.0),
        "ami": (information - chance) / (entropy - chance),
        "f1": 2 * _pairs(shared_M) / (_pairs(classes_C) + _pairs(clusters_K)),
    }


def _entropy(sizes: Counts) -> float:
    shares = sizes / sizes.sum()
    return -float((shares * np.log(shares)).sum())


def _pairs(sizes: Counts) -> int:
    return int((sizes * (sizes - 1) // 2).sum())


def expected_information(sizes_C: Counts, sizes_K: Counts) -> float:
    """Mutual information that two partitions with blocks of these sizes have on average when drawn blindly, in nats.

    Exact. What a class and a cluster add depends on their two sizes alone, and N samples make at most sqrt(2 N)
    different sizes, so each pair of sizes is summed once: at N = 60,000 milliseconds, not a pass over C x K cells.

    Args:
        sizes_C: samples of each class, each at least 1.
        sizes_K: samples of each cluster, each at least 1, of the same sum.
    """
    n = int(sizes_C.sum())
    log_factorial = torch.arange(1, n + 2, dtype=torch.float64).lgamma().numpy()
    (a_U, times_U), (b_V, times_V) = (np.unique(sizes, return_counts=True) for sizes in (sizes_C, sizes_K))
    total = 0.0
    for a, times_a in zip(a_U.tolist(), times_U.tolist(), strict=True):
        for b, times_b in zip(b_V.tolist(), times_V.tolist(), strict=True):
            total += times_a * times_b * _expected_term(a, b, n, log_factorial)
    return total


def _expected_term(a: int, b: int, n: int, log_factorial: Floats) -> float:
    """Sum over the samples x that a class of a and a cluster of b may share, hypergeometric, of x/n log(nx / (ab))."""
    x = np.arange(max(1, a + b - n), min(a, b) + 1)
    f = log_factorial
    chance = np.exp(f[a] + f[b] + f[n - a] + f[n - b] - f[n] - f[x] - f[a - x] - f[b - x] - f[n - a - b + x])
    return float((chance * x / n * np.log(n * x / (a * b))).sum())

"""Which of a step's candidates make its batch, by their embeddings: coresets and distance histograms.

A step's candidates are G groups of K samples of one class. What is chosen are P groups of P different classes, so that
each anchor has its positives; a sample that is picked brings its group along. Distances are Euclidean between unit
vectors. Memory stays O(G * K * D), and O(512 * M) while the distances among M rows are counted.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Rows = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

BINS = 64
"""Equal bins of a distance histogram, over [0, 2]."""


@dataclass(frozen=True, eq=False)
class Pool:
    """The candidates of one step."""

    rows_UD: Rows
    """Embeddings of unit norm of the samples among the candidates, each once."""
    groups_GK: Indices
    """Positions in rows_UD, K of one class side by side; every P groups in order are P classes, a batch of pk."""
    labels_G: Indices
    """The class of each group; each class comes at most once in P groups in order."""
    uniforms_P: Floats
    """Draws in [0, 1), keyed by (seed, epoch, step)."""


Choose = Callable[[Pool], Indices]
"""A pool -> the P chosen groups, int64 (P,), of P different classes."""


def greedy_k_center(pool: Pool) -> Indices:
    """Greedy k-center: after a first group at random, always the group of the sample farthest from all chosen ones.

    The class of a chosen group is not chosen again. Of samples equally far, the first in the pool is picked.

    With K = 1 the largest distance from any candidate to the batch is at most twice the smallest possible (Gonzalez,
    "Clustering to minimize the maximum intercluster distance", 1985); as a batch: Sinha et al., "Small-GAN: Speeding up
    GAN training using core-sets", ICML 2020, arXiv 1910.13540.
    """
    return _grow(pool, lambda squared_U, _: int(squared_U.argmax()))


def d2_weighted(pool: Pool) -> Indices:
    """D^2 weighting: after a first group at random, each sample's group with probability d^2 / sum d^2.

    d is a sample's distance to the nearest chosen one; the class of a chosen group has probability 0 from then on. A
    softer greedy_k_center that single outliers do not rule. Candidates that all coincide are chosen uniformly.

    Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007.
    """
    return _grow(pool, _drawn)


class HistogramMatch:
    """Distance-histogram matching: of G / P candidate batches, the one whose pairwise distances look most like many.

    The measure is the Wasserstein-1 distance (in units of distance) between the histogram of the batch's P * K samples'
    distances, all pairs, and that of a larger sample: the area between the two cumulative histograms. A batch holds
    more positives than the sample does; candidates share that offset.

    Roth et al., "Revisiting training strategies and generalization performance in deep metric learning", ICML 2020,
    arXiv 2002.08473. The published code compares the heights of bins as if they were distances and adds differences of
    mean and standard deviation; this is the distance between the histograms themselves.

    Args:
        sample_RD: embeddings of unit norm of the larger sample.
    """

    def __init__(self, sample_RD: Rows) -> None:
        self.target_T = cumulative_histogram(sample_RD)

    def __call__(self, pool: Pool) -> Indices:
        """The groups of the nearest candidate batch; of equally near ones the first."""
        batch = len(pool.uniforms_P)
        candidates_MB = pool.groups_GK.reshape(len(pool.groups_GK) // batch, -1)
        gaps = [histogram_gap(pool.rows_UD[members_B], self.target_T) for members_B in candidates_MB]
        return int(np.argmin(gaps)) * batch + np.arange(batch, dtype=np.int64)


def histogram_gap(rows_BD: Rows, target_T: Floats) -> float:
    """Wasserstein-1 distance, in [0, 2], between the distances among rows and a cumulative histogram of distances."""
    return float(np.abs(cumulative_histogram(rows_BD) - target_T).sum() * 2 / BINS)


def cumulative_histogram(rows_ND: Rows) -> Floats:
    """Share of the pairs of rows whose distance is at most the end of each of BINS bins; float64 (BINS,)."""
    counts_T = np.zeros(BINS, dtype=np.int64)
    block = 512  # rows at a time, so that memory stays O(block * N)
    for start in range(0, len(rows_ND), block):
        above = rows_ND[start : start + block]
        later = np.arange(start, len(rows_ND)) > np.arange(start, start + len(above))[:, None]
        distances = np.sqrt(np.maximum(2 - 2 * (above @ rows_ND[start:].T)[later], 0))
        bins = np.minimum((distances * (BINS / 2)).astype(np.int64), BINS - 1)
        counts_T += np.bincount(bins, minlength=BINS)
    shares_T: Floats = np.cumsum(counts_T) / max(counts_T.sum(), 1)
    return shares_T


def _grow(pool: Pool, pick: Callable[[Floats, float], int]) -> Indices:
    """Groups added one by one; pick((distance to the nearest chosen sample)^2 or 0 where not eligible, draw)."""
    groups, samples = pool.groups_GK.shape
    # A sample may be in two groups of a small class: it then stands for the first.
    group_U = np.empty(len(pool.rows_UD), dtype=np.int64)
    group_U[pool.groups_GK[::-1].ravel()] = np.repeat(np.arange(groups)[::-1], samples)
    label_U = pool.labels_G[group_U]
    squared_U = np.full(len(group_U), np.inf)
    eligible_U = np.ones(len(group_U), dtype=bool)
    group = int(pool.uniforms_P[0] * groups)
    chosen = [group]
    for draw in pool.uniforms_P[1:]:
        similarity_U = (pool.rows_UD @ pool.rows_UD[pool.groups_GK[group]].T).max(axis=1)
        squared_U = np.minimum(squared_U, np.maximum(2 - 2 * similarity_U.astype(np.float64), 0))
        eligible_U &= label_U != pool.labels_G[group]
        weights_U = np.where(eligible_U, squared_U, 0)
        group = int(group_U[pick(weights_U if weights_U.any() else eligible_U.astype(np.float64), float(draw))])
        chosen.append(group)
    return np.array(chosen, dtype=np.int64)


def _drawn(weights_U: Floats, draw: float) -> int:
    """The position whose share of the weights the draw falls into; never one of weight 0."""
    ends_U = np.cumsum(weights_U)
    found = int(np.searchsorted(ends_U, draw * ends_U[-1], side="right"))
    return min(found, int(np.flatnonzero(weights_U)[-1]))

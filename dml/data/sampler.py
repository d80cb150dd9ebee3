"""P x K batches: each holds P classes with K samples of each, the same for every number of ranks."""

import numpy as np
import numpy.typing as npt

from dml import draws
from dml.config import BatchConfig

Indices = npt.NDArray[np.int64]

_CLASS_STREAM, _SAMPLE_STREAM = 0x636C73, 0x736D70  # keep the draws apart that share a seed and an epoch


def steps_per_epoch(labels_N: Indices, batch: BatchConfig) -> int:
    """Global batches that hold as many images as there are: N / (P * K), rounded up."""
    return -(-len(labels_N) // batch.size)


def plan(labels_N: Indices, batch: BatchConfig, *, seed: int, epoch: int, steps: int) -> Indices:
    """The first global batches of an epoch, (steps, P * K) int64: row s depends on (seed, epoch, s) alone.

    Classes come in rounds, each a new permutation of all of them that is consumed P at a time; a batch that straddles
    two rounds holds no class twice. A class's samples are permuted once an epoch and consumed K at a time, around and
    around: none repeats in a batch unless the class has fewer than K, which then repeat evenly. labels_N are dense
    (0..C-1, each present); the samples of a class lie side by side in a row.

    Raises:
        ValueError: fewer than P classes.
    """
    counts_C = np.bincount(labels_N)
    if len(counts_C) < batch.classes:
        raise ValueError(f"batch.classes is {batch.classes}, but there are {len(counts_C)} classes")
    classes, visits = _visits(len(counts_C), batch.classes, seed, epoch, steps)
    shuffle_N = draws.uniform(_SAMPLE_STREAM, seed, epoch, rows=np.arange(len(labels_N)), count=1)[:, 0]
    by_class_N = np.lexsort((shuffle_N, labels_N))
    starts_C = np.cumsum(counts_C) - counts_C
    turns = visits[:, None] * batch.samples + np.arange(batch.samples)
    chosen = by_class_N[starts_C[classes][:, None] + turns % counts_C[classes][:, None]]
    return chosen.reshape(steps, batch.size).astype(np.int64)


def rank_slice(indices: Indices, rank: int, world: int) -> Indices:
    """The rank's share: contiguous, sizes that differ by one at most, and the shares in order are the whole."""
    total = len(indices)
    return indices[total * rank // world : total * (rank + 1) // world]


def _visits(num_classes: int, per_batch: int, seed: int, epoch: int, steps: int) -> tuple[Indices, Indices]:
    """Classes in the order in which batches take them, and how often each was taken before."""
    needed = steps * per_batch
    rounds = -(-needed // num_classes)
    order: list[Indices] = []
    begun = np.empty(0, dtype=np.int64)  # classes of the batch that the round before left unfinished
    for number in range(rounds):
        permuted = draws.permutation(_CLASS_STREAM, seed, epoch, number, n=num_classes)
        if len(begun):
            fresh = permuted[~np.isin(permuted, begun)][: per_batch - len(begun)]
            permuted = np.concatenate([fresh, permuted[~np.isin(permuted, fresh)]])
        order.append(permuted)
        left = (number + 1) * num_classes % per_batch
        begun = permuted[num_classes - left :]
    visits = np.repeat(np.arange(rounds, dtype=np.int64), num_classes)
    return np.concatenate([*order, np.empty(0, dtype=np.int64)])[:needed], visits[:needed]

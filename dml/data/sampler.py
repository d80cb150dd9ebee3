"""Which images make the global batch of each training step, the same for every number of ranks.

A plan is int64 (steps, P * K): row s holds positions in the training split. Of the plain samplers (pk, spc, random) it
is a function of (seed, epoch, s) alone; of the embedding-driven ones (greedy_coreset, d2_coreset, dhm) of these and of
the embeddings they are given. So training resumes at any step: with plan[s:], or the stored plan[s:].
An epoch of every sampler is as long as would hold each image once (`steps_per_epoch`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dml import draws, gather
from dml.config import BatchConfig
from dml.data import coresets
from dml.names import unknown

Indices = npt.NDArray[np.int64]
Embed = Callable[[Indices], Tensor]
"""Positions (M,) -> their embeddings, float32 (M, D) of unit norm, the same on every rank; every rank calls it."""

# Keep the draws apart that share a seed and an epoch.
_CLASS_STREAM, _SAMPLE_STREAM, _CHOICE_STREAM, _LARGER_STREAM = 0x636C73, 0x736D70, 0x636872, 0x6C7267


@dataclass(frozen=True, eq=False)
class Epoch:
    """What a sampler plans for.

    Attributes:
        labels_N: int64 (N,), dense (0..C-1, each present).
        batch: P, K and the sampler's settings.
        seed: of the run.
        epoch: from 0.
        steps: global batches to plan.
        embed: gives the embedding-driven samplers their embeddings.
        group: ranks that share the work of choosing.
    """

    labels_N: Indices
    batch: BatchConfig
    seed: int
    epoch: int
    steps: int
    embed: Embed | None = None
    group: gather.Group | None = None


def steps_per_epoch(labels_N: Indices, batch: BatchConfig) -> int:
    """Global batches that hold as many images as there are: N / (P * K), rounded up."""
    return -(-len(labels_N) // batch.size)


def plan(
    labels_N: Indices,
    batch: BatchConfig,
    *,
    seed: int,
    epoch: int,
    steps: int,
    embed: Embed | None = None,
    group: gather.Group | None = None,
) -> Indices:
    """The first global batches of an epoch by the sampler that batch names, (steps, P * K) int64, on every rank alike.

    Args:
        labels_N: int64 (N,), dense (0..C-1, each present).
        batch: sampler, P, K, and what it needs.
        seed: of the run.
        epoch: from 0.
        steps: how many.
        embed: for the embedding-driven samplers, which call it once, with the candidates of all steps.
        group: ranks that share the work of the embedding-driven samplers, a collective; None for this one alone.

    Raises:
        ValueError: as `check`; an embedding-driven sampler without embed.
    """
    check(labels_N, batch)
    return SAMPLERS[batch.sampler](Epoch(labels_N, batch, seed, epoch, steps, embed, group))


def check(labels_N: Indices, batch: BatchConfig, classes: Sequence[str] | None = None) -> None:
    """Refuses labels that batches cannot be made of.

    Args:
        labels_N: int64 (N,), dense.
        batch: sampler, P and K.
        classes: names by label, for the message.

    Raises:
        ValueError: an unknown sampler; fewer than P classes, or, for random, fewer than P * K images; a class with
            fewer than K samples when batch.small_classes is refuse.
    """
    if batch.sampler not in SAMPLERS:
        raise ValueError(unknown("batch.sampler", batch.sampler, SAMPLERS))
    counts_C = np.bincount(labels_N)
    if batch.sampler == "random":
        if len(labels_N) < batch.size:
            raise ValueError(
                f"a batch is {batch.classes} x {batch.samples} images, but there are {len(labels_N)}; "
                f"valid: batch.classes * batch.samples up to {len(labels_N)}"
            )
        return
    if len(counts_C) < batch.classes:
        raise ValueError(f"batch.classes is {batch.classes}, but there are {len(counts_C)} classes")
    small = np.flatnonzero(counts_C < batch.samples)
    if batch.small_classes == "refuse" and len(small):
        first = repr(classes[small[0]]) if classes is not None else f"class {small[0]}"
        raise ValueError(
            f"{len(small)} of {len(counts_C)} classes have fewer than batch.samples {batch.samples} images, such as "
            f"{first} with {counts_C[small[0]]}; valid: batch.samples up to {counts_C.min()}, or "
            "batch.small_classes repeat"
        )


def rank_slice(indices: Indices, rank: int, world: int) -> Indices:
    """The rank's share: contiguous, sizes that differ by one at most, and the shares in order are the whole."""
    total = len(indices)
    return indices[total * rank // world : total * (rank + 1) // world]


def pk(epoch: Epoch) -> Indices:
    """P classes x K samples in rounds: every class comes before any comes again.

    Classes come in rounds, each a new permutation of all of them that is consumed P at a time; a batch that straddles
    two rounds holds no class twice. A class's samples are permuted once an epoch and consumed K at a time, around and
    around: none repeats in a batch unless the class has fewer than K, which then repeat evenly. The samples of a class
    lie side by side in a row.
    """
    labels_N, batch = epoch.labels_N, epoch.batch
    counts_C = np.bincount(labels_N)
    needed = epoch.steps * batch.classes
    classes, visits = _rounds(len(counts_C), batch.classes, needed, _CLASS_STREAM, epoch)
    shuffle_N = draws.uniform(_SAMPLE_STREAM, epoch.seed, epoch.epoch, rows=np.arange(len(labels_N)), count=1)[:, 0]
    by_class_N = np.lexsort((shuffle_N, labels_N))
    starts_C = np.cumsum(counts_C) - counts_C
    turns = visits[:, None] * batch.samples + np.arange(batch.samples)
    chosen = by_class_N[starts_C[classes][:, None] + turns % counts_C[classes][:, None]]
    return chosen.reshape(epoch.steps, batch.size).astype(np.int64)


def spc(epoch: Epoch) -> Indices:
    """SPC-n: P classes at random, n = K samples of each at random, every step anew.

    Within a batch it is like pk: different classes, and no sample twice unless its class has fewer than K. Between
    batches it is not: a step knows nothing of the ones before, so an epoch leaves classes and samples out and brings
    others more often (after S steps a class was in none with probability (1 - P/C)^S, 37% where S = C/P), while pk's
    rounds bring all evenly.

    Roth et al., ICML 2020, arXiv 2002.08473. The published code draws classes and samples with replacement.
    """
    labels_N, batch = epoch.labels_N, epoch.batch
    counts_C = np.bincount(labels_N)
    by_class_N = np.argsort(labels_N, kind="stable")
    starts_C = np.cumsum(counts_C) - counts_C
    plan_SPK = np.empty((epoch.steps, batch.classes, batch.samples), dtype=np.int64)
    for step in range(epoch.steps):
        key = (epoch.seed, epoch.epoch, step)
        for place, label in enumerate(draws.permutation(_CLASS_STREAM, *key, n=len(counts_C))[: batch.classes]):
            members = by_class_N[starts_C[label] :][: counts_C[label]]
            shuffle = np.argsort(draws.uniform(_SAMPLE_STREAM, *key, rows=members, count=1)[:, 0], kind="stable")
            plan_SPK[step, place] = members[shuffle[np.arange(batch.samples) % len(members)]]
    return plan_SPK.reshape(epoch.steps, batch.size)


def uniform(epoch: Epoch) -> Indices:
    """Random: P * K images whatever their classes; every image comes before any comes again, none twice in a batch.

    With many classes most samples of a batch have no positive there.
    """
    size = epoch.batch.size
    images, _ = _rounds(len(epoch.labels_N), size, epoch.steps * size, _SAMPLE_STREAM, epoch)
    return images.reshape(epoch.steps, size)


def greedy_coreset(epoch: Epoch) -> Indices:
    """P x K by greedy k-center (`coresets.greedy_k_center`) over `candidates` batches of pk a step."""
    return _chosen(epoch, lambda _: coresets.greedy_k_center)


def d2_coreset(epoch: Epoch) -> Indices:
    """P x K by D^2 weighting (`coresets.d2_weighted`) over `candidates` batches of pk a step."""
    return _chosen(epoch, lambda _: coresets.d2_weighted)


def dhm(epoch: Epoch) -> Indices:
    """The one of `candidates` batches of pk that matches the distances in a larger sample (`HistogramMatch`).

    The sample is drawn once an epoch: as many images as a step's candidates, or all there are.
    """
    return _chosen(epoch, coresets.HistogramMatch)


SAMPLERS: dict[str, Callable[[Epoch], Indices]] = {
    "pk": pk,
    "spc": spc,
    "random": uniform,
    "greedy_coreset": greedy_coreset,
    "d2_coreset": d2_coreset,
    "dhm": dhm,
}

EMBEDDING_DRIVEN = frozenset({"greedy_coreset", "d2_coreset", "dhm"})
"""The samplers whose plan depends on the encoder."""


def _chosen(epoch: Epoch, chooser: Callable[[coresets.Rows], coresets.Choose]) -> Indices:
    """Each step's P groups out of `candidates` batches of pk; every rank chooses for its share of the steps.

    All ranks get the plan gathered from the shares, so that they agree even where their arithmetic rounds differently.
    """
    batch, steps = epoch.batch, epoch.steps
    if epoch.embed is None:
        raise ValueError(f"batch.sampler {batch.sampler} chooses by embeddings: plan needs embed")
    many = Epoch(epoch.labels_N, batch, epoch.seed, epoch.epoch, steps * batch.candidates)
    pools_SGK = pk(many).reshape(steps, batch.candidates * batch.classes, batch.samples)
    members_M = np.unique(pools_SGK)
    on_device_MD = epoch.embed(members_M)
    rows_MD = on_device_MD.float().cpu().numpy()
    key = (epoch.seed, epoch.epoch)
    larger = draws.permutation(_LARGER_STREAM, *key, n=len(members_M))[: batch.candidates * batch.size]
    choose = chooser(rows_MD[larger])
    share = rank_slice(np.arange(steps), gather.rank(epoch.group), gather.world(epoch.group))
    chosen = np.empty((len(share), batch.size), dtype=np.int64)
    for row, step in enumerate(share):
        samples_U, groups = np.unique(pools_SGK[step], return_inverse=True)
        pool = coresets.Pool(
            rows_UD=rows_MD[np.searchsorted(members_M, samples_U)],
            groups_GK=groups.reshape(pools_SGK[step].shape),
            labels_G=epoch.labels_N[pools_SGK[step, :, 0]],
            uniforms_P=draws.uniform(_CHOICE_STREAM, *key, rows=[step], count=batch.classes)[0],
        )
        chosen[row] = pools_SGK[step, choose(pool)].ravel()
    mine = torch.from_numpy(chosen).to(on_device_MD.device)
    counts = gather.row_counts(len(mine), epoch.group, mine.device)
    plan_SB: Indices = gather.gather(mine, counts, epoch.group).cpu().numpy()
    return plan_SB


def _rounds(things: int, per_batch: int, needed: int, stream: int, epoch: Epoch) -> tuple[Indices, Indices]:
    """Things in the order in which batches take them, none twice in a batch, and how often each was taken before."""
    rounds = -(-needed // things)
    order: list[Indices] = []
    begun = np.empty(0, dtype=np.int64)  # what is in the batch that the round before left unfinished
    for number in range(rounds):
        permuted = draws.permutation(stream, epoch.seed, epoch.epoch, number, n=things)
        if len(begun):
            fresh = permuted[~np.isin(permuted, begun)][: per_batch - len(begun)]
            permuted = np.concatenate([fresh, permuted[~np.isin(permuted, fresh)]])
        order.append(permuted)
        left = (number + 1) * things % per_batch
        begun = permuted[things - left :]
    visits = np.repeat(np.arange(rounds, dtype=np.int64), things)
    return np.concatenate([*order, np.empty(0, dtype=np.int64)])[:needed], visits[:needed]

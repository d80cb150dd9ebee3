"""Coresets and histogram matching against plain loops in float64, and through the sampler, from candidates to batch."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from dml.config import BatchConfig
from dml.data import coresets, sampler
from dml.data.coresets import Pool
from tests.contracts.sampler_contract import SIZES, embedder, labels_of


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def squared_distance(a: Sequence[float], b: Sequence[float]) -> float:
    return max(2 - 2 * math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True)), 0.0)


def weights_of(pool: Pool, chosen: list[int]) -> list[tuple[float, int]]:
    """For each sample in the order of rows_UD: squared distance to the chosen (0 if its class is), and its group."""
    near = [pool.rows_UD[sample] for group in chosen for sample in pool.groups_GK[group]]
    classes = {int(pool.labels_G[group]) for group in chosen}
    found = []
    for sample, row in enumerate(pool.rows_UD):
        group = next(g for g, members in enumerate(pool.groups_GK) if sample in members)
        taken = int(pool.labels_G[group]) in classes
        found.append((0.0 if taken else min(squared_distance(row, other) for other in near), group))
    return found


def greedy_oracle(pool: Pool) -> list[int]:
    chosen = [int(pool.uniforms_P[0] * len(pool.groups_GK))]
    while len(chosen) < len(pool.uniforms_P):
        weights = weights_of(pool, chosen)
        best = max(weight for weight, _ in weights)
        chosen.append(next(group for weight, group in weights if weight == best))
    return chosen


def pool_of(seed: int, *, classes: int, samples: int, candidates: int, size: int, dim: int = 3) -> Pool:
    """Candidates as pk brings them; classes of `size` images, so that groups overlap where candidates * K exceed it."""
    generator = np.random.default_rng(seed)
    labels_N = np.repeat(np.arange(classes + 2), size)
    rows_ND = unit(generator.normal(size=(len(labels_N), dim)))
    batch = BatchConfig(classes=max(classes, 2), samples=max(samples, 2))
    pk = sampler.plan(labels_N, batch, seed=seed, epoch=0, steps=candidates)
    groups = pk.reshape(-1, batch.samples)[:, :samples]
    members, positions = np.unique(groups, return_inverse=True)
    uniforms = generator.random(classes)
    return Pool(rows_ND[members], positions.reshape(groups.shape), labels_N[groups[:, 0]], uniforms)


@pytest.mark.parametrize(("samples", "size"), [(1, 9), (2, 9), (3, 9), (3, 4), (4, 2)])
def test_greedy_k_center_is_that_of_plain_loops(samples: int, size: int) -> None:
    for seed in range(6):
        pool = pool_of(seed, classes=4, samples=samples, candidates=3, size=size)
        assert coresets.greedy_k_center(pool).tolist() == greedy_oracle(pool)


def test_of_equally_far_samples_the_first_is_picked() -> None:
    corners = np.array([[1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 1, 0]], dtype=np.float32)
    pool = Pool(corners, np.arange(5)[:, None], np.arange(5), np.array([0.0, 0.9, 0.9, 0.9]))
    assert coresets.greedy_k_center(pool).tolist() == greedy_oracle(pool) == [0, 1, 2, 3]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_greedy_k_center_is_within_twice_the_best_cover(seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = unit(generator.normal(size=(9, 3)))
    pool = Pool(rows, np.arange(9)[:, None], np.arange(9), generator.random(3))

    def radius(centres: Sequence[int]) -> float:
        return max(min(math.sqrt(squared_distance(row, rows[c])) for c in centres) for row in rows)

    best = min(radius(centres) for centres in itertools.combinations(range(9), 3))
    assert radius(coresets.greedy_k_center(pool).tolist()) <= 2 * best + 1e-6


def test_d2_weighting_draws_with_the_probabilities_of_plain_loops() -> None:
    pool = pool_of(3, classes=3, samples=2, candidates=3, size=3)
    first, second = 0.3, 0.61
    start = int(first * len(pool.groups_GK))
    draws = (np.arange(4000) + 0.5) / 4000  # equally spaced, so that frequencies are probabilities
    found = [
        coresets.d2_weighted(Pool(pool.rows_UD, pool.groups_GK, pool.labels_G, np.array([first, u]))) for u in draws
    ]
    then = int(coresets.d2_weighted(Pool(pool.rows_UD, pool.groups_GK, pool.labels_G, np.array([first, second])))[1])
    thirds = [
        coresets.d2_weighted(Pool(pool.rows_UD, pool.groups_GK, pool.labels_G, np.array([first, second, u])))
        for u in draws
    ]
    for chosen, rows in (([start], found), ([start, then], thirds)):
        assert all(row[:-1].tolist() == chosen for row in rows)
        weights = weights_of(pool, chosen)
        total = math.fsum(weight for weight, _ in weights)
        for group in range(len(pool.groups_GK)):
            expected = math.fsum(weight for weight, owner in weights if owner == group) / total
            frequency = sum(int(row[-1]) == group for row in rows) / len(rows)
            # Each of a group's samples is an interval of draws, whose two ends the grid sees to half a step.
            assert frequency == pytest.approx(expected, abs=len(pool.groups_GK[0]) / 4000), f"group {group}"


@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2**-53])
def test_d2_weighting_never_draws_a_class_twice_at_either_end(draw: float) -> None:
    for seed in range(20):
        pool = pool_of(seed, classes=5, samples=2, candidates=2, size=6)
        chosen = coresets.d2_weighted(Pool(pool.rows_UD, pool.groups_GK, pool.labels_G, np.full(5, draw)))
        assert len(set(pool.labels_G[chosen].tolist())) == 5


def test_d2_weighting_of_coinciding_candidates_is_uniform() -> None:
    rows = np.tile(np.array([[0.6, 0.8]], dtype=np.float32), (6, 1))
    draws = (np.arange(600) + 0.5) / 600
    pools = [Pool(rows, np.arange(6)[:, None], np.arange(6), np.array([0.0, u])) for u in draws]
    second = np.bincount([int(coresets.d2_weighted(pool)[1]) for pool in pools], minlength=6)
    assert second.tolist() == [0, 120, 120, 120, 120, 120]


@pytest.mark.parametrize("count", [2, 17, 700])
def test_the_cumulative_histogram_is_that_of_plain_counting(count: int) -> None:
    rows = unit(np.random.default_rng(count).normal(size=(count, 4)))
    distances = [np.linalg.norm(a.astype(float) - b) for a, b in itertools.combinations(rows[:60], 2)]
    ends = np.arange(1, coresets.BINS + 1) * 2 / coresets.BINS
    expected = [np.mean(np.array(distances) < end) for end in ends]
    np.testing.assert_allclose(coresets.cumulative_histogram(rows[:60]), expected, atol=1e-12)
    whole = coresets.cumulative_histogram(rows)
    assert whole[-1] == 1
    assert (np.diff(whole) >= 0).all()
    full = np.sqrt(np.maximum(2 - 2 * (rows @ rows.T)[np.triu_indices(count, 1)], 0))
    np.testing.assert_allclose(whole, [np.mean(full < end) for end in ends], atol=2 / len(full))


def test_the_gap_is_the_wasserstein_distance_up_to_a_bins_width() -> None:
    generator = np.random.default_rng(0)
    one, other = (unit(generator.normal(size=(40, 4)) + shift) for shift in (0, 1))
    pairs = [[float(np.linalg.norm(a - b)) for a, b in itertools.combinations(rows, 2)] for rows in (one, other)]
    gap = coresets.histogram_gap(one, coresets.cumulative_histogram(other))
    assert gap == pytest.approx(wasserstein_distance(*pairs), abs=2 / coresets.BINS)
    assert coresets.histogram_gap(one, coresets.cumulative_histogram(one)) == 0


def candidates_of(labels: np.ndarray, batch: BatchConfig, *, seed: int, epoch: int, steps: int) -> np.ndarray:
    """The batches of pk that each step chooses among: (steps, candidates, P, K)."""
    pk = batch.model_copy(update={"sampler": "pk"})
    many = sampler.plan(labels, pk, seed=seed, epoch=epoch, steps=steps * batch.candidates)
    return many.reshape(steps, batch.candidates, batch.classes, batch.samples)


def test_distance_histogram_matching_takes_the_candidate_nearest_to_a_larger_sample() -> None:
    labels = labels_of([8] * 40)
    embed = embedder(labels)
    batch = BatchConfig(classes=8, samples=3, sampler="dhm", candidates=10)
    plan = sampler.plan(labels, batch, seed=1, epoch=2, steps=16, embed=embed)
    everyone = embed(np.arange(len(labels))).numpy()
    assert batch.candidates * batch.size < len(labels) + 1, "so the larger sample is a part of the training set"

    def gap(rows: np.ndarray) -> float:
        return coresets.histogram_gap(everyone[rows.ravel()], coresets.cumulative_histogram(everyone))

    pools = candidates_of(labels, batch, seed=1, epoch=2, steps=16)
    assert all(any((row == option.ravel()).all() for option in pool) for row, pool in zip(plan, pools, strict=True))
    chosen = np.array([gap(row) for row in plan])
    every = np.array([[gap(option) for option in pool] for pool in pools])
    assert chosen.mean() < 0.75 * every.mean()
    assert (chosen < np.median(every, axis=1)).mean() > 0.9


@pytest.mark.parametrize("name", ["greedy_coreset", "d2_coreset"])
def test_a_batch_is_chosen_by_the_embeddings_of_its_own_candidates(name: str) -> None:
    """Guards against a flaw of published code: positions found in one random pool, looked up in another."""
    labels = labels_of([6] * 40)
    lone = 77
    near, far = torch.tensor([0.8, 0.6]), torch.tensor([-0.8, 0.6])

    def embed(indices: np.ndarray) -> torch.Tensor:
        return torch.where(torch.from_numpy(indices == lone)[:, None], far, near)

    batch = BatchConfig(classes=4, samples=2, sampler=name, candidates=3)
    plan = sampler.plan(labels, batch, seed=0, epoch=0, steps=30, embed=embed)
    pools = candidates_of(labels, batch, seed=0, epoch=0, steps=30)
    offered = [bool((pool == lone).any()) for pool in pools]
    assert 0 < sum(offered) < 30
    for row, pool, there in zip(plan, pools, offered, strict=True):
        assert (lone in row) == there, "the one image that lies apart is in the batch of each step that offers it"
        groups = {tuple(group) for group in pool.reshape(-1, 2).tolist()}
        assert {tuple(group) for group in row.reshape(-1, 2).tolist()} <= groups


def test_greedy_coreset_plans_what_plain_loops_choose_from_the_candidates() -> None:
    labels = labels_of(SIZES)
    embed = embedder(labels)
    batch = BatchConfig(classes=4, samples=3, sampler="greedy_coreset", candidates=2)
    plan = sampler.plan(labels, batch, seed=5, epoch=3, steps=6, embed=embed)
    for row, pool in zip(plan, candidates_of(labels, batch, seed=5, epoch=3, steps=6), strict=True):
        groups = pool.reshape(-1, 3).tolist()
        start = groups.index(row[:3].tolist())
        members = sorted({image for group in groups for image in group})
        positions = np.array([[members.index(image) for image in group] for group in groups])
        uniforms = np.array([(start + 0.5) / len(groups), 0, 0, 0])
        rows = embed(np.array(members)).numpy()
        expected = greedy_oracle(Pool(rows, positions, labels[np.array(groups)[:, 0]], uniforms))
        assert [row[place * 3 : place * 3 + 3].tolist() for place in range(4)] == [groups[g] for g in expected]


def test_coresets_cover_more_of_the_space_than_random_batches() -> None:
    labels = labels_of([6] * 60)
    embed = embedder(labels, dim=4)
    everyone = embed(np.arange(len(labels))).numpy()
    radius = {}
    for name in ("pk", "d2_coreset", "greedy_coreset"):
        batch = BatchConfig(classes=10, samples=2, sampler=name, candidates=6)
        plan = sampler.plan(labels, batch, seed=0, epoch=0, steps=20, embed=embed)
        radius[name] = np.mean([1 - (everyone @ everyone[row].T).max(axis=1).min() for row in plan])
    assert radius["greedy_coreset"] < radius["d2_coreset"] < radius["pk"]

"""Histograms of calibration pairs, against pairs measured one by one."""

import itertools

import numpy as np
import pytest

from dml.metrics.distance_histograms import BINS, EDGES, DistanceHistograms, bins_of
from dml.metrics.pair_distances import Distance, PairDistances, pair_distances


def embeddings(seed: int = 0, count: int = 60, dim: int = 4) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    rows = draws.normal(size=(count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), draws.integers(0, 6, count)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_every_pair_is_counted_in_the_bin_of_its_euclidean_distance(distance: Distance) -> None:
    rows, labels = embeddings()
    found = DistanceHistograms.of(pair_distances(rows, labels, distance=distance))
    expected = {True: np.zeros(BINS, int), False: np.zeros(BINS, int)}
    for i, j in itertools.combinations(range(len(rows)), 2):
        length = float(np.linalg.norm(rows[i] - rows[j]))
        expected[bool(labels[i] == labels[j])][min(BINS - 1, max(0, int(np.ceil(length / 2 * BINS)) - 1))] += 1
    assert found.positives == tuple(expected[True])
    assert found.negatives == tuple(expected[False])


def test_counts_up_to_an_edge_are_what_a_threshold_there_accepts() -> None:
    rows, labels = embeddings(seed=1)
    pairs = pair_distances(rows, labels)
    found = DistanceHistograms.of(pairs)
    for edge in (10, 50, 73):
        assert sum(found.negatives[:edge]) == pairs.negatives_M[pairs.distances_M <= EDGES[edge]].sum()


def test_both_ends_of_the_range_have_a_bin() -> None:
    assert bins_of(np.array([-1e-7, 0.0, 0.02, 0.0200001, 2.0, 2.0000002])).tolist() == [0, 0, 0, 1, BINS - 1, BINS - 1]
    duplicates = PairDistances(np.array([-2e-7, 2.0]), np.array([1, 0]), np.array([0, 1]), "cosine")
    found = DistanceHistograms.of(duplicates)
    assert (found.positives[0], found.negatives[-1]) == (1, 1)


def test_json_takes_them_there_and_back() -> None:
    found = DistanceHistograms.of(pair_distances(*embeddings()))
    assert DistanceHistograms.of_dict(found.as_dict()) == found


@pytest.mark.parametrize("counts", [[1] * (BINS - 1), [-1] + [0] * (BINS - 1), [0.5] * BINS])
def test_histograms_of_another_form_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match="negatives: a histogram has 100 counts"):
        DistanceHistograms.of_dict({"positives": [1] * BINS, "negatives": counts})

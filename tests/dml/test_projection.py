"""The map keeps neighbours together, of a sample that is fair to every class."""

import numpy as np
import pytest
import torch

from dml.projection import project


def clustered(sizes, dim=16, noise=0.05, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return rng.standard_normal((len(sizes), dim))[labels] + noise * rng.standard_normal((len(labels), dim)), labels


def test_neighbours_stay_neighbours():
    rows, labels = clustered([15] * 6)
    ids, points = project(rows, labels)
    np.testing.assert_array_equal(ids, np.arange(90))
    apart = np.linalg.norm(points[:, None] - points[None], axis=2) + np.where(np.eye(90), np.inf, 0)
    assert (labels[apart.argmin(axis=1)] == labels).mean() > 0.95


def test_the_map_is_the_same_for_the_same_seed_and_any_scale_of_the_rows():
    rows, labels = clustered([10] * 4)
    _, points = project(rows, labels, seed=3)
    _, again = project(torch.from_numpy(rows * 4.0), torch.from_numpy(labels), seed=3)
    np.testing.assert_array_equal(points, again)


@pytest.mark.parametrize("sizes", [[3] * 100, [1] * 90 + [6] * 20, [7] * 40], ids=["equal", "singletons", "sevens"])
def test_of_many_samples_whole_classes_are_kept(sizes):
    rows, labels = clustered(sizes)
    ids, points = project(rows, labels, limit=50)
    assert 50 - max(sizes) < len(ids) <= 50
    assert points.shape == (len(ids), 2)
    kept, counts = np.unique(labels[ids], return_counts=True)
    # A class may fill a twentieth of the limit: 2 samples here.
    np.testing.assert_array_equal(counts, np.minimum(np.array(sizes)[kept], 2))
    assert (np.diff(ids) > 0).all()


def test_a_huge_class_leaves_room_for_the_others():
    rows, labels = clustered([400, 5, 5, 5, 5])
    ids, _ = project(rows, labels, limit=100)
    assert np.bincount(labels[ids]).tolist() == [20, 5, 5, 5, 5]


def test_another_seed_takes_other_classes():
    rows, labels = clustered([2] * 60, dim=4)
    assert set(labels[project(rows, labels, seed=0, limit=6)[0]]) != set(
        labels[project(rows, labels, seed=1, limit=6)[0]]
    )


@pytest.mark.parametrize(
    "rows",
    [np.eye(3), np.ones((20, 4)), np.ones((20, 1)), np.eye(8), np.repeat(np.eye(2), 10, axis=0)],
    ids=["three", "all equal", "one dimension", "eight", "two spots"],
)
def test_degenerate_embeddings_have_finite_places(rows):
    ids, points = project(rows, np.arange(len(rows)) // 2)
    assert points.shape == (len(ids), 2)
    assert np.isfinite(points).all()


def test_few_samples_are_laid_out_by_their_principal_components():
    rows = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.6, 0.8, 0.0], [0.8, 0.6, 0.0]])  # in one plane
    _, points = project(rows, [0, 0, 1, 1])
    np.testing.assert_allclose(
        np.linalg.norm(points[:, None] - points[None], axis=2),
        np.linalg.norm(rows[:, None] - rows[None], axis=2),
        atol=1e-12,
    )


def test_a_map_of_one_point_is_refused():
    with pytest.raises(ValueError, match="limit must be at least 2, got 1"):
        project(*clustered([2, 2]), limit=1)

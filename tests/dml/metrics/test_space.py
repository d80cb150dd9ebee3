"""Space metrics against loops over pairs in float64, and sets whose figures are known by hand."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dml.metrics import space as module
from dml.metrics.space import singular_values, space, spectral_decay


def sample(n=90, classes=12, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return rng.standard_normal((classes, dim))[labels] + rng.standard_normal((n, dim)), labels


def with_singletons():
    rows, labels = sample(seed=1)
    labels[:6] = np.arange(100, 106)
    return rows, labels


def one_huge_class():
    rows, labels = sample(seed=2)
    labels[10:] = 3
    return rows, labels


def lattice():
    """Duplicates everywhere, and classes whose samples cancel out now and then."""
    rng = np.random.default_rng(3)
    rows = rng.integers(-1, 2, (80, 3)).astype(float)
    rows[~rows.any(axis=1)] = 1.0
    return rows, np.arange(80) // 2


SETS = {
    "random": sample(),
    "singletons": with_singletons(),
    "one huge class": one_huge_class(),
    "duplicates": lattice(),
    "fewer rows than dimensions": sample(n=9, classes=3, dim=20),
    "two classes": sample(n=20, classes=2),
}


def unit(row):
    length = math.sqrt(sum(x * x for x in row))
    return [x / length for x in row] if length > 1e-9 else [0.0 for _ in row]


def cosine_distances(rows):
    return [1 - sum(x * y for x, y in zip(a, b, strict=True)) for a, b in combinations(rows, 2)]


def mean(values):
    return sum(values) / len(values)


def oracle(rows, labels):
    rows = [unit(row) for row in rows.tolist()]
    members = {c: [row for row, label in zip(rows, labels, strict=True) if label == c] for c in set(labels.tolist())}
    intra = mean([mean(cosine_distances(own)) for own in members.values() if len(own) > 1])
    inter = mean(
        cosine_distances([unit([mean(column) for column in zip(*own, strict=True)]) for own in members.values()])
    )
    s = np.linalg.svd(np.array(rows), compute_uv=False)
    s = np.maximum(s, 1e-6 * s.max())
    rho = sum(1 / len(s) * math.log(1 / len(s) / (value / s.sum())) for value in s)
    return {"pi_intra": intra, "pi_inter": inter, "pi_ratio": intra / max(inter, 1e-8), "spectral_decay": rho}


@pytest.mark.parametrize("name", SETS)
def test_equals_loops_over_pairs(name):
    rows, labels = SETS[name]
    assert space(rows, labels) == pytest.approx(oracle(rows, labels), abs=1e-9)


@pytest.mark.parametrize("chunk", [1, 7, 89])
def test_chunks_change_nothing(chunk, monkeypatch):
    whole, values = space(*sample()), singular_values(sample()[0])
    monkeypatch.setattr(module, "CHUNK", chunk)
    assert space(*sample()) == pytest.approx(whole, abs=1e-12)
    assert singular_values(sample()[0]) == pytest.approx(values, abs=1e-12)


def test_by_hand():
    # Class 0 at 0 and 90 degrees: distance 1, mean at 45. Class 1 at 180 twice. Class 2, alone, at 270.
    rows, labels = np.array([[1.0, 0], [0, 2], [-3, 0], [-1, 0], [0, -5]]), np.array([0, 0, 1, 1, 2])
    found = space(rows, labels)
    cos135 = -math.sqrt(0.5)
    assert found["pi_intra"] == pytest.approx((1 + 0) / 2)
    assert found["pi_inter"] == pytest.approx(((1 - cos135) + (1 - cos135) + 1) / 3)
    assert singular_values(rows) == pytest.approx([math.sqrt(3), math.sqrt(2)])


def test_all_embeddings_equal_have_no_distances_and_the_steepest_spectrum():
    found = space(np.full((4000, 64), 0.3, dtype=np.float32), np.arange(4000) // 4)
    assert found["pi_intra"] == pytest.approx(0, abs=1e-12)
    assert found["pi_inter"] == pytest.approx(0, abs=1e-12)
    assert found["spectral_decay"] == pytest.approx(63 / 64 * math.log(1e6) - math.log(64), abs=1e-3)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_class_that_cancels_out_has_no_direction():
    # The samples of class 0 are opposite, those of class 1 at 0, 120 and 240 degrees; class 2 has a direction.
    turns = np.deg2rad([20, 200, 0, 120, 240, 77, 77])
    rows, labels = np.stack([np.cos(turns), np.sin(turns)], axis=1), np.array([0, 0, 1, 1, 1, 2, 2])
    for dtype in (np.float32, np.float64):
        found = space(rows.astype(dtype), labels)
        assert found["pi_inter"] == pytest.approx(1)
        assert found["pi_intra"] == pytest.approx((2 + 1.5 + 0) / 3)


def test_classes_at_right_angles_and_a_flat_spectrum():
    found = space(np.repeat(np.eye(8), 5, axis=0), np.repeat(np.arange(8), 5))
    assert found == {"pi_intra": 0.0, "pi_inter": 1.0, "pi_ratio": 0.0, "spectral_decay": pytest.approx(0, abs=1e-12)}


def test_opposite_classes_are_the_farthest():
    found = space(np.array([[1.0, 0], [1, 0], [-1, 0], [-1, 0]]), np.array([0, 0, 1, 1]))
    assert (found["pi_intra"], found["pi_inter"]) == (0, 2)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_invariances(seed):
    rows, labels = sample(n=40, classes=8, seed=seed)
    rng = np.random.default_rng(seed)
    order, turn = rng.permutation(40), np.linalg.qr(rng.standard_normal((6, 6)))[0]
    found = pytest.approx(space(rows, labels), abs=1e-10)
    assert space(rows[order], labels[order]) == found
    assert space(rows @ turn, labels) == found
    assert space(rows * 10.0 ** rng.uniform(-30, 30, (40, 1)), labels) == found
    assert space(rows, 7 - 3 * labels) == found
    # A whole copy of the set changes neither the class means nor the shape of the spectrum.
    twice = space(np.tile(rows, (2, 1)), np.tile(labels, 2))
    assert {k: twice[k] for k in ("pi_inter", "spectral_decay")} == pytest.approx(
        {k: found.expected[k] for k in ("pi_inter", "spectral_decay")}, abs=1e-10
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_float_widths_of_torch(dtype):
    rows, labels = sample()
    held = torch.from_numpy(rows).to(dtype)
    assert space(held, torch.from_numpy(labels)) == pytest.approx(space(held.double().numpy(), labels), abs=1e-6)


@pytest.mark.parametrize(("n", "dim"), [(200, 7), (5, 30), (1, 3), (40, 40)])
def test_singular_values_are_those_of_the_unit_rows(n, dim):
    rows = np.random.default_rng(0).standard_normal((n, dim)) * np.geomspace(1, 50, n)[:, None] + 0.5
    found = singular_values(rows)
    expected = np.linalg.svd(rows / np.linalg.norm(rows, axis=1, keepdims=True), compute_uv=False)
    assert found.shape == (min(n, dim),)
    assert found == pytest.approx(expected, abs=1e-6)
    assert (found**2).sum() == pytest.approx(n)


@pytest.mark.parametrize("dim", [16, 512])
def test_rounding_of_float32_does_not_pass_for_a_direction(dim):
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((700, 3)) @ rng.standard_normal((3, dim))).astype(np.float32)
    exact = singular_values(rows)[:3]
    expected = spectral_decay(np.concatenate([exact, np.zeros(dim - 3)]))
    assert spectral_decay(singular_values(rows)) == pytest.approx(expected, abs=1e-12)


def test_spectral_decay_by_hand():
    assert spectral_decay(np.ones(7)) == 0
    assert spectral_decay(np.array([3.0, 1.0])) == pytest.approx(
        0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    )
    assert spectral_decay(np.array([5.0])) == 0
    steep = [spectral_decay(np.geomspace(1, end, 20)) for end in (1, 0.5, 0.1, 1e-3, 1e-9)]
    assert steep == sorted(steep)
    assert spectral_decay(np.array([1.0, 0, 0])) == spectral_decay(np.array([1.0, 1e-6, 1e-9]))
    assert spectral_decay(np.geomspace(1, 1e-3, 20)) == pytest.approx(spectral_decay(1e8 * np.geomspace(1, 1e-3, 20)))


def test_bad_input_is_named():
    rows, labels = sample()
    for wrong, what in ((np.nan, "NaN or infinity"), (0, "only zeros")):
        rows[33] = wrong
        with pytest.raises(ValueError, match=f"row 33 of the embeddings holds {what}"):
            space(rows, labels)
        with pytest.raises(ValueError, match=f"row 33 of the embeddings holds {what}"):
            singular_values(rows)
    with pytest.raises(ValueError, match="two classes"):
        space(np.ones((4, 2)), np.zeros(4, dtype=int))
    for array in (np.ones(4), np.ones((0, 4)), np.ones((4, 0)), np.ones((4, 4), dtype=int)):
        with pytest.raises(ValueError, match=r"needs floats \(N, D\)"):
            singular_values(array)
    for values in ([], [0.0, 0.0]):
        with pytest.raises(ValueError, match="needs a singular value above 0"):
            spectral_decay(np.array(values))

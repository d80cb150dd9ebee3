"""Few-shot accuracy against classifiers written out in loops, on episodes that the tests draw themselves."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dml.metrics.classification import METHODS, SMOOTHING, classification, gnb, knn, svm


def blobs(classes=8, samples=12, dim=6, spread=0.8, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), samples)
    return rng.standard_normal((classes, dim))[labels] + spread * rng.standard_normal((len(labels), dim)), labels


def episode(classes=6, shots=5, queries=40, seed=0):
    rows, labels = blobs(classes, shots + queries, seed=seed)
    rows = torch.nn.functional.normalize(torch.from_numpy(rows), dim=1)
    first = torch.from_numpy(np.arange(len(labels)) % (shots + queries) < shots)
    return rows[first], torch.from_numpy(labels)[first], rows[~first]


def oracle_knn(shots, classes, query, k):
    nearest = sorted(range(len(shots)), key=lambda i: -float(shots[i] @ query))[:k]
    votes = {}
    for i in nearest:
        number, similarity = votes.get(classes[i], (0, 0.0))
        votes[classes[i]] = (number + 1, similarity + float(shots[i] @ query))
    return max(votes, key=votes.get)


@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 100])
def test_knn_is_a_vote_of_the_nearest_and_similarity_breaks_ties(shots, k):
    shots_SD, class_S, queries = episode(shots=shots)
    found = knn(shots_SD, class_S, k)(queries)
    assert found.tolist() == [oracle_knn(shots_SD, class_S.tolist(), query, k) for query in queries]


def oracle_gnb(shots, classes, query):
    """The class with the largest sum of log densities of the features, every class as likely as any other."""
    smoothing = SMOOTHING * shots.var(axis=0).max()
    scores = []
    for c in sorted(set(classes)):
        own = [row for row, label in zip(shots, classes, strict=True) if label == c]
        score = 0.0
        for feature, x in enumerate(query):
            values = [row[feature] for row in own]
            centre = sum(values) / len(values)
            variance = sum((v - centre) ** 2 for v in values) / len(values) + smoothing
            score -= (x - centre) ** 2 / (2 * variance) + math.log(2 * math.pi * variance) / 2
        scores.append(score)
    return scores.index(max(scores))


@pytest.mark.parametrize("shots", [2, 5])
def test_naive_bayes_by_its_densities(shots):
    shots_SD, class_S, queries = episode(shots=shots)
    found = gnb(shots_SD, class_S)(queries)
    assert found.tolist() == [oracle_gnb(shots_SD.numpy(), class_S.tolist(), query) for query in queries.numpy()]


def test_naive_bayes_of_one_shot_is_the_nearest_shot():
    shots_SD, class_S, queries = episode(shots=1)
    assert (gnb(shots_SD, class_S)(queries) == knn(shots_SD, class_S)(queries)).all()


def test_svm_puts_a_plane_between_classes_that_one_can_part():
    # Along one feature, across another that is wider: the nearest shot is often of the wrong class, the plane is not.
    rng = np.random.default_rng(0)
    wide = rng.uniform(-1, 1, 400)
    labels = rng.integers(0, 2, 400)
    rows = np.stack([0.1 * (2 * labels - 1) + 0.02 * rng.standard_normal(400), wide, np.ones(400)], axis=1)
    rows, labels = torch.from_numpy(rows), torch.from_numpy(labels)
    right = (svm(rows[:30] * 10, labels[:30])(rows[30:] * 10) == labels[30:]).double().mean()
    assert right == 1


def test_accuracy_is_the_mean_over_classes_of_the_share_told_right():
    # 800 samples of class 0 and half of the 200 of class 1 are one point. With a shot of class 1 from its other half,
    # class 0 is told right whole and class 1 in 99 of 199 queries; else the shots are alike and one class takes all.
    rows = np.concatenate([np.tile([1.0, 0], (900, 1)), np.tile([0.0, 1], (100, 1))])
    labels = np.repeat([0, 1], [800, 200])
    found = classification(rows, labels, shots=1, methods=("knn",), repeats=50)["knn_1shot"]
    good_episodes = (found - 0.5) / (0.5 * 99 / 199) * 50
    assert good_episodes == pytest.approx(round(good_episodes), abs=1e-9)
    assert 10 < good_episodes < 40


def test_classes_apart_are_all_told_and_equal_embeddings_are_told_by_chance():
    rows, labels = np.eye(8)[np.arange(80) % 8], np.arange(80) % 8
    apart = classification(rows, labels, shots=(1, 5))
    equal = classification(np.ones((80, 4)), labels, shots=(1, 5))
    for method in METHODS:
        for m in (1, 5):
            name = f"{method}_{m}shot"
            assert (apart[name], apart[f"{name}_low"], apart[f"{name}_high"]) == (1, 1, 1)
            assert equal[name] == pytest.approx(1 / 8)


def test_more_shots_help_and_every_figure_has_a_name():
    rows, labels = blobs(classes=20, samples=20)
    found = classification(rows, labels, shots=(1, 5))
    assert set(found) == {
        *(f"{method}_{m}shot{end}" for method in METHODS for m in (1, 5) for end in ("", "_low", "_high")),
        *(f"{count}_{m}shot" for count in ("classes", "classes_left_out") for m in (1, 5)),
    }
    for method in METHODS:
        assert found[f"{method}_1shot_high"] < found[f"{method}_5shot_low"]
        assert found[f"{method}_1shot_low"] < found[f"{method}_1shot"] < found[f"{method}_1shot_high"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert classification(rows, labels, shots=np.int64(5)).items() <= found.items()


def test_classes_with_no_sample_left_to_ask_are_left_out_and_counted():
    rows, labels = blobs(classes=5)
    keep = np.ones(len(labels), bool)
    keep[labels == 0] = np.arange(12) < 5
    keep[labels == 3] = np.arange(12) < 1
    found = classification(rows[keep], labels[keep], shots=(1, 4, 5), methods=("knn",))
    assert [found[f"classes_{m}shot"] for m in (1, 4, 5)] == [4, 4, 3]
    assert [found[f"classes_left_out_{m}shot"] for m in (1, 4, 5)] == [1, 1, 2]
    alone = np.isin(labels, (1, 2, 4))
    same = classification(rows[alone], labels[alone], shots=5, methods=("knn",))
    assert found["knn_5shot"] == same["knn_5shot"]


def test_fewer_classes_in_an_episode_are_easier():
    rows, labels = blobs(classes=30)
    few, all_ = (classification(rows, labels, methods=("knn",), max_classes=n) for n in (3, 30))
    assert (few["classes_5shot"], all_["classes_5shot"]) == (3, 30)
    assert few["knn_5shot_low"] > all_["knn_5shot_high"]


def test_a_seed_repeats_exactly_and_another_draws_anew():
    rows, labels = blobs()
    assert classification(rows, labels, seed=3) == classification(rows, labels, seed=3)
    assert len({classification(rows, labels, seed=seed, methods=("knn",))["knn_5shot"] for seed in range(4)}) == 4


def test_methods_share_the_episodes_and_do_not_depend_on_each_other():
    rows, labels = blobs()
    together = classification(rows, labels, shots=(1, 5))
    for method in METHODS:
        for m in (1, 5):
            assert classification(rows, labels, shots=m, methods=(method,)).items() <= together.items()


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_scaling_rotation_and_names_of_classes_change_nothing(seed):
    rows, labels = blobs(seed=seed)
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    found = classification(rows, labels, repeats=3)
    assert classification(rows * 2.0 ** rng.integers(-9, 9, (len(rows), 1)), labels, repeats=3) == pytest.approx(found)
    assert classification(rows, 5 + 3 * labels, repeats=3) == found
    turned = classification(rows @ turn, labels, repeats=3, methods=("knn", "svm"))
    assert {name: found[name] for name in turned} == pytest.approx(turned)


def test_the_order_of_rows_moves_the_draws_within_their_interval():
    rows, labels = blobs(classes=20, samples=30)
    order = np.random.default_rng(0).permutation(len(labels))
    one, other = (classification(r, y, repeats=20) for r, y in ((rows, labels), (rows[order], labels[order])))
    for method in METHODS:
        assert one[f"{method}_5shot_low"] < other[f"{method}_5shot_high"]
        assert other[f"{method}_5shot_low"] < one[f"{method}_5shot_high"]


def test_intervals_hold_the_accuracy_over_endlessly_many_episodes():
    rows, labels = blobs(classes=12, samples=10)
    settings = {"shots": 3, "methods": ("knn",), "max_classes": 6}
    truth = classification(rows, labels, repeats=1500, seed=10**6, **settings)["knn_3shot"]
    runs = [classification(rows, labels, repeats=10, seed=seed, **settings) for seed in range(200)]
    held = sum(run["knn_3shot_low"] <= truth <= run["knn_3shot_high"] for run in runs) / len(runs)
    assert 0.90 <= held <= 0.98


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_widths(dtype):
    rows, labels = blobs()
    held = torch.from_numpy(rows).to(dtype)
    assert classification(held, torch.from_numpy(labels)) == pytest.approx(classification(held.float(), labels))


def test_what_cannot_be_is_named(monkeypatch):
    rows, labels = blobs()
    with pytest.raises(ValueError, match="unknown method 'smv'; valid: svm, "):
        classification(rows, labels, methods=("knn", "smv"))
    for name, value, least in [
        ("shots", 0, 1),
        ("repeats", 1, 2),
        ("k", 0, 1),
        ("max_classes", 1, 2),
        ("shots", 1.5, 1),
    ]:
        with pytest.raises(ValueError, match=f"{name} must be an integer, at least {least}, got {value}"):
            classification(rows, labels, **{name: value})
    with pytest.raises(ValueError, match="at least one number of shots and one method"):
        classification(rows, labels, methods=())
    with pytest.raises(ValueError, match=r"12-shot needs two classes with more than 12 samples, got 0; the largest"):
        classification(rows, labels, shots=(1, 12))
    rows[33] = np.nan
    with pytest.raises(ValueError, match="row 33"):
        classification(rows, labels)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "onethreshold\[cpu\]"'):
        classification(*blobs())

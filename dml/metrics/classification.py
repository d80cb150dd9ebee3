"""Does an embedding recognise classes that it never saw, from a few labelled samples and with no classifier trained?"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dml.metrics.inputs import Array, Floats, unit_rows
from dml.metrics.neighbours import nearest
from dml.names import unknown

Predict: TypeAlias = Callable[[Tensor], Tensor]
"""From queries (Q, D) to the classes (Q,) they are taken for."""

CHUNK = 8192
"""Queries answered at a time; bounds the memory of their scores."""
SMOOTHING = 0.1
"""Of the largest variance of a feature, the share that naive Bayes adds to every variance."""


def classification(
    embeddings_ND: Array,
    labels_N: Array,
    *,
    shots: int | Sequence[int] = 5,
    methods: Sequence[str] = ("knn", "svm", "gnb"),
    repeats: int = 10,
    k: int = 1,
    max_classes: int = 100,
    seed: int = 0,
) -> dict[str, float]:
    """Accuracy of simple classifiers that are given m labelled samples a class, on all other samples of those classes.

    An episode draws at most `max_classes` of the classes that have more than m samples, and m samples of each to learn
    from; the rest of their samples are asked. Its accuracy is the mean over its classes of the share told right, so a
    class counts the same whatever its size, and guessing scores 1 / classes. All methods answer the same episodes.

    The 95% interval is Student's over the episodes: where the mean over endlessly many such episodes of these samples
    lies. It tells what the draws of classes and shots leave open; it does not cover that other samples, or other
    classes than those in this set, would have been easier or harder.

    Args:
        embeddings_ND: (N, D) floats of any width, NumPy or torch; rows are normalised.
        labels_N: (N,) integers.
        shots: m, or several.
        methods: "knn", "svm", "gnb": see `METHODS`.
        repeats: episodes, at least 2.
        k: neighbours that vote in "knn", at most all shots.
        max_classes: classes in an episode, at least 2; a linear SVM costs time in proportion to its square.
        seed: of the draws.

    Returns:
        for each method and m: knn_5shot, the accuracy, with knn_5shot_low and knn_5shot_high; for each m:
        classes_5shot, the classes in each episode, and classes_left_out_5shot, those with too few samples.

    Raises:
        ValueError: bad input (see `dml.metrics.inputs.unit_rows`), an unknown method, a number that cannot be, or fewer
            than two classes with more than m samples.
        ModuleNotFoundError: no faiss, for "knn"; it says which extra to install.
    """
    every_m: list[int] = np.atleast_1d(shots).tolist()
    _check(every_m, methods, repeats=repeats, k=k, max_classes=max_classes)
    rows_ND, labels = unit_rows(embeddings_ND, labels_N)
    rows_ND, members = rows_ND.cpu(), _members(labels)
    results: dict[str, float] = {}
    for m in every_m:
        able = [ids for ids in members if len(ids) > m]
        if len(able) < 2:
            raise ValueError(
                f"{m}-shot needs two classes with more than {m} samples, got {len(able)}; "
                f"the largest class has {max(map(len, members))} samples, the next {sorted(map(len, members))[-2]}"
            )
        accuracy_RM = np.array(
            [_episode(rows_ND, able, m, methods, k, max_classes, (seed, m, repeat)) for repeat in range(repeats)]
        )
        for method, accuracy_R in zip(methods, accuracy_RM.T, strict=True):
            results |= _with_interval(f"{method}_{m}shot", accuracy_R)
        results[f"classes_{m}shot"] = float(min(len(able), max_classes))
        results[f"classes_left_out_{m}shot"] = float(len(members) - len(able))
    return results


def _check(shots: Sequence[int], methods: Sequence[str], *, repeats: int, k: int, max_classes: int) -> None:
    if not shots or not methods:
        raise ValueError(f"needs at least one number of shots and one method, got {shots} and {list(methods)}")
    for method in methods:
        if method not in METHODS:
            raise ValueError(unknown("method", method, METHODS))
    wanted = [*(("shots", m, 1) for m in shots), ("repeats", repeats, 2), ("k", k, 1), ("max_classes", max_classes, 2)]
    for name, value, least in wanted:
        if int(value) != value or value < least:
            raise ValueError(f"{name} must be an integer, at least {least}, got {value}")


def _members(labels_N: Tensor) -> list[Tensor]:
    """For each class, in the order of the labels, the rows that are of it."""
    _, class_N, sizes_C = labels_N.cpu().unique(return_inverse=True, return_counts=True)
    return list(class_N.argsort(stable=True).split(sizes_C.tolist()))


def _episode(
    rows_ND: Tensor,
    able: Sequence[Tensor],
    m: int,
    methods: Sequence[str],
    k: int,
    max_classes: int,
    key: tuple[int, int, int],
) -> list[float]:
    """The accuracy of each method in one draw of classes and shots."""
    rng = np.random.default_rng(key)
    chosen = np.sort(rng.choice(len(able), min(len(able), max_classes), replace=False)).tolist()
    shuffled = [able[c][torch.from_numpy(rng.permutation(len(able[c])))] for c in chosen]
    shots_SD = rows_ND[torch.cat([ids[:m] for ids in shuffled])]
    class_S = torch.arange(len(chosen)).repeat_interleave(m)
    asked_C = torch.tensor([len(ids) - m for ids in shuffled])
    asked_Q, class_Q = torch.cat([ids[m:] for ids in shuffled]), torch.arange(len(chosen)).repeat_interleave(asked_C)
    accuracies = []
    for method in methods:
        predict = METHODS[method](shots_SD, class_S, k)
        found_Q = torch.cat([predict(rows_ND[ids]) for ids in asked_Q.split(CHUNK)])
        right_C = class_Q[found_Q == class_Q].bincount(minlength=len(chosen))
        accuracies.append(float((right_C.double() / asked_C).mean()))
    return accuracies


def _with_interval(name: str, accuracy_R: Floats) -> dict[str, float]:
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    mean, repeats = float(accuracy_R.mean()), len(accuracy_R)
    half = float(stdtrit(repeats - 1, 0.975) * accuracy_R.std(ddof=1)) / math.sqrt(repeats)
    return {name: mean, f"{name}_low": max(0.0, mean - half), f"{name}_high": min(1.0, mean + half)}


def knn(shots_SD: Tensor, class_S: Tensor, k: int = 1) -> Predict:
    """The class of most of the k nearest shots by cosine similarity; of classes with as many, the more similar.

    Args:
        shots_SD: (S, D) unit rows.
        class_S: (S,) int64, 0..C-1.
        k: neighbours that vote, at least 1; beyond S all shots vote.
    """
    classes = int(class_S.max()) + 1

    def predict(queries_QD: Tensor) -> Tensor:
        similarity_QK, ids_QK = nearest(queries_QD, shots_SD, k)
        # One vote each, and so little for similarity that it decides between equal votes only.
        votes_QK = 1 + (1 + similarity_QK.double().clamp(-1, 1)) / (2 * (k + 1))
        votes_QC = votes_QK.new_zeros(len(queries_QD), classes).scatter_add_(1, class_S[ids_QK], votes_QK)
        return votes_QC.argmax(dim=1)

    return predict


def svm(shots_SD: Tensor, class_S: Tensor, k: int = 1) -> Predict:
    """A linear support vector machine for each class against the others; the largest margin decides (scikit-learn)."""
    from sklearn.svm import LinearSVC

    return _of_sklearn(LinearSVC(random_state=0, max_iter=10_000), shots_SD, class_S)


def gnb(shots_SD: Tensor, class_S: Tensor, k: int = 1) -> Predict:
    """Gaussian naive Bayes: a mean and a variance for each class and feature (scikit-learn).

    Few shots say little about a variance, and one shot nothing: SMOOTHING of the largest variance of a feature over all
    shots is added to each. With one shot that is all there is, and the nearest shot wins. Not invariant to rotation.
    """
    from sklearn.naive_bayes import GaussianNB

    if not shots_SD.double().numpy().var(axis=0).any():
        # All shots alike: no class is likelier, and scikit-learn would divide by zero.
        return lambda queries_QD: torch.zeros(len(queries_QD), dtype=torch.int64)
    return _of_sklearn(GaussianNB(var_smoothing=SMOOTHING), shots_SD, class_S)


def _of_sklearn(model: Any, shots_SD: Tensor, class_S: Tensor) -> Predict:
    with warnings.catch_warnings():
        # With one shot there are as many classes as samples, which it takes for a regression.
        warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%", UserWarning)
        model.fit(shots_SD.double().numpy(), class_S.numpy())
    return lambda queries_QD: torch.from_numpy(model.predict(queries_QD.double().numpy()))


METHODS: dict[str, Callable[[Tensor, Tensor, int], Predict]] = {"knn": knn, "svm": svm, "gnb": gnb}
"""The classifiers: (shots (S, D), classes (S,), k) -> predict. Only "knn" has use for k."""

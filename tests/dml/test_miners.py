"""Each miner against loops over samples that use the same draws; what it draws over many keys; ranks as slices."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dml.miners import _NEGATIVE, _POSITIVE, MINERS
from dml.pairs import Pairs

Triple = tuple[int, int, int]
Rows = list[list[float]]


def batches() -> Iterator[tuple[str, Pairs]]:
    """Balanced, ragged, tied and one-sided batches, float64."""
    generator = torch.Generator().manual_seed(0)

    def rows(n: int, dim: int = 5) -> torch.Tensor:
        return torch.randn(n, dim, generator=generator, dtype=torch.float64)

    cases = {
        "balanced": (rows(16), [c for c in range(4) for _ in range(4)]),
        "in disorder": (rows(12), [2, 0, 1, 2, 2, 0, 1, 1, 0, 3, 3, 2]),
        "singletons": (rows(7), [0, 1, 1, 2, 3, 3, 3]),
        "one huge class": (rows(30), [0] * 26 + [1, 2, 3, 3]),
        "ties": (torch.eye(3, dtype=torch.float64)[torch.arange(12) % 3], [c for c in range(3) for _ in range(4)]),
        "all equal": (torch.ones(8, 5, dtype=torch.float64), [0, 0, 0, 1, 1, 2, 2, 3]),
        "near classes": (
            rows(4).repeat_interleave(4, 0) + 0.3 * rows(16),
            [c for c in range(4) for _ in range(4)],
        ),
        "two dimensions": (rows(12, 2), [c for c in range(3) for _ in range(4)]),
        "no positive": (rows(4), [0, 1, 2, 3]),
        "one class": (rows(4), [1, 1, 1, 1]),
        "one sample": (rows(1), [0]),
    }
    for name, (embeddings, labels) in cases.items():
        yield name, Pairs.of(embeddings, torch.tensor(labels), key=(3, 11))
    ids, labels = torch.arange(12) % 7, torch.arange(12) % 7 // 2
    yield "samples twice", Pairs.of(rows(7)[ids], labels, ids_B=ids, key=(3, 11))


BATCHES = dict(batches())


def pick(weights: list[tuple[int, float]], draw: float) -> int | None:
    """The first column at which the running sum of weights exceeds draw * total."""
    total, seen = sum(weight for _, weight in weights), 0.0
    for column, weight in weights:
        seen += weight
        if seen > draw * total:
            return column
    return None


def oracle(name: str, pairs: Pairs) -> list[Triple]:
    """The miner's docstring as loops, over the same similarities and draws."""
    s, labels = pairs.similarity.tolist(), pairs.col_labels.tolist()
    count = len(labels)
    ids = range(count) if pairs.col_ids is None else pairs.col_ids.tolist()
    positive_draws = pairs.draws(_POSITIVE, 1).tolist()
    negative_draws = pairs.draws(_NEGATIVE, max(1, count)).tolist()
    found: list[Triple] = []
    for a in range(count):
        positives = [x for x in range(count) if ids[x] != ids[a] and labels[x] == labels[a]]
        negatives = [x for x in range(count) if labels[x] != labels[a]]
        if positives and negatives:
            rule = RULES[name]
            found += [(a, *rest) for rest in rule(pairs, s[a], a, positives, negatives, positive_draws, negative_draws)]
    return found


def distance(s: float) -> float:
    return math.sqrt(max(0.0, 2 - 2 * s))


def even(columns: list[int]) -> list[tuple[int, float]]:
    return [(column, 1.0) for column in columns]


Rule = Callable[[Pairs, list[float], int, list[int], list[int], Rows, Rows], list[tuple[int, int]]]


def random(pairs, s, a, positives, negatives, u, v):
    return [(pick(even(positives), u[a][0]), pick(even(negatives), v[a][0]))]


def semihard(pairs, s, a, positives, negatives, u, v):
    found = []
    for k, p in enumerate(positives):
        band = [n for n in negatives if s[n] < s[p] and distance(s[n]) < distance(s[p]) + 0.2]
        band.sort(key=lambda n: s[n])
        if band:
            found.append((p, band[int(v[a][k] * len(band))]))
    return found


def softhard(pairs, s, a, positives, negatives, u, v):
    far = [p for p in positives if s[p] < max(s[n] for n in negatives)]
    near = [n for n in negatives if s[n] > min(s[p] for p in positives)]
    return [(pick(even(far), u[a][0]), pick(even(near), v[a][0]))] if far else []


def hardest(pairs, s, a, positives, negatives, u, v):
    return [(min(positives, key=lambda p: s[p]), max(negatives, key=lambda n: s[n]))]


def weights_of(s: list[float], negatives: list[int], dim: int) -> list[tuple[int, float]]:
    near = []
    for n in negatives:
        d = max(distance(s[n]), 0.5)
        if distance(s[n]) < 1.4:
            near.append((n, 1 / (d ** (dim - 2) * (1 - d * d / 4) ** ((dim - 3) / 2))))
    return near or even(negatives)


def distance_weighted(pairs, s, a, positives, negatives, u, v):
    weights = weights_of(s, negatives, pairs.rows.shape[1])
    return [(p, pick(weights, v[a][k])) for k, p in enumerate(positives)]


def multi_similarity(pairs, s, a, positives, negatives, u, v):
    far = [p for p in positives if s[p] < max(s[n] for n in negatives) + 0.1]
    near = [n for n in negatives if s[n] > min(s[p] for p in positives) - 0.1]
    return [(p, pick(even(near), v[a][k])) for k, p in enumerate(far)]


def n_pair(pairs, s, a, positives, negatives, u, v):
    labels = pairs.col_labels.tolist()
    found = []
    for c, label in enumerate(sorted(set(labels))):
        members = [n for n in negatives if labels[n] == label]
        if members:
            found.append((pick(even(positives), u[a][0]), members[int(v[a][c] * len(members))]))
    return found


RULES: dict[str, Rule] = {
    "random": random,
    "semihard": semihard,
    "softhard": softhard,
    "hardest": hardest,
    "distance_weighted": distance_weighted,
    "multi_similarity": multi_similarity,
    "n_pair": n_pair,
}


def mined(name: str, pairs: Pairs) -> list[Triple]:
    return list(zip(*(column.tolist() for column in MINERS[name]()(pairs)), strict=True))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MINERS)
def test_a_miner_finds_what_its_docstring_says(name: str, batch: str) -> None:
    pairs = BATCHES[batch]
    found, expected = mined(name, pairs), oracle(name, pairs)
    if batch in ("ties", "all equal") and name in ("hardest", "semihard"):
        # Which of equally similar columns it is, is open.
        s = pairs.similarity
        assert [(a, s[a, p].item(), s[a, n].item()) for a, p, n in found] == [
            (a, s[a, p].item(), s[a, n].item()) for a, p, n in expected
        ]
    else:
        assert found == expected
    if batch in ("no positive", "one class", "one sample"):
        assert not found
    elif name in ("random", "hardest", "distance_weighted", "n_pair"):
        assert found, "every anchor with a positive and a negative has a tuple"


@pytest.mark.parametrize("name", MINERS)
def test_ranks_mine_together_what_one_process_mines(name: str) -> None:
    """A rank holds a slice of the rows and all columns."""
    for batch, whole in BATCHES.items():
        cut = len(whole.rows) // 3
        parts: list[Triple] = []
        for start, stop in ((0, cut), (cut, cut), (cut, len(whole.rows))):
            part = replace(
                whole, rows=whole.rows[start:stop], row_labels=whole.row_labels[start:stop], row_offset=start
            )
            part.__dict__["similarity"] = whole.similarity[start:stop]  # a product of another shape rounds differently
            parts += [(a + start, p, n) for a, p, n in mined(name, part)]
        assert parts == mined(name, whole), batch


@pytest.mark.parametrize("name", sorted(set(MINERS) - {"hardest"}))
def test_draws_follow_the_key_alone(name: str) -> None:
    pairs = BATCHES["balanced"]
    assert mined(name, pairs) == mined(name, replace(pairs, key=(3, 11)))
    assert mined(name, pairs) != mined(name, replace(pairs, key=(3, 12)))
    assert mined(name, pairs) != mined(name, replace(pairs, key=(4, 11)))


def frequencies(name: str, pairs: Pairs, anchor: int, place: int, keys: int = 1000) -> dict[int, float]:
    """How often each column is a positive (1) or a negative (2) of the anchor's tuples."""
    counts: Counter[int] = Counter()
    for step in range(keys):
        counts.update(t[place] for t in mined(name, replace(pairs, key=(0, step))) if t[0] == anchor)
    return {column: count / counts.total() for column, count in counts.items()}


def test_random_draws_each_negative_and_each_positive_alike() -> None:
    pairs = BATCHES["in disorder"]
    for place, columns in ((1, [3, 4, 11]), (2, [1, 2, 5, 6, 7, 8, 9, 10])):
        found = frequencies("random", pairs, anchor=0, place=place)
        assert found == {column: pytest.approx(1 / len(columns), abs=0.06) for column in columns}


def test_distance_weighted_draws_by_the_inverse_of_the_density_on_the_sphere() -> None:
    pairs = BATCHES["balanced"]
    weights = weights_of(pairs.similarity[5].tolist(), [0, 1, 2, 3, *range(8, 16)], dim=5)
    assert 2 < len(weights) < 12, "some lie beyond the cut-off"
    total = sum(weight for _, weight in weights)
    found = frequencies("distance_weighted", pairs, anchor=5, place=2)
    assert found == {column: pytest.approx(weight / total, abs=0.035) for column, weight in weights if column in found}
    assert sum(weight for column, weight in weights if column not in found) / total < 0.005


@pytest.mark.parametrize("dim", [1, 2, 3, 128, 2048])
def test_distance_weighted_is_stable_in_any_dimension(dim: int) -> None:
    """1 / q(0.5) is about 10^600 at 2048 dimensions."""
    rows = torch.randn(24, dim, generator=torch.Generator().manual_seed(1))
    rows[1::4] = rows[0]
    tuples = MINERS["distance_weighted"]()(Pairs.of(rows, torch.arange(24) // 4))
    assert len(tuples.anchor) == 24 * 3
    labels = torch.arange(24) // 4
    assert (labels[tuples.anchor] == labels[tuples.positive]).all()
    assert (labels[tuples.anchor] != labels[tuples.negative]).all()


@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=24),
    seed=st.integers(0, 1000),
    levels=st.sampled_from([None, 2, 3]),
    name=st.sampled_from(sorted(MINERS)),
)
@settings(max_examples=150, deadline=None)
def test_positives_share_the_anchors_class_and_negatives_do_not(
    labels: list[int], seed: int, levels: int | None, name: str
) -> None:
    rows = torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(seed))
    if levels is not None:  # few distinct points: ties and duplicates
        rows = rows[torch.arange(len(labels)) % levels]
    known = torch.tensor(labels)
    anchor, positive, negative = MINERS[name]()(Pairs.of(rows, known, key=(seed, 0)))
    assert (known[anchor] == known[positive]).all()
    assert (anchor != positive).all()
    assert (known[anchor] != known[negative]).all()
    assert (anchor.diff() >= 0).all()


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_rotation_of_the_space_changes_no_tuple(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    labels = torch.arange(16) // 4
    for name in MINERS:
        assert mined(name, Pairs.of(rows, labels)) == mined(name, Pairs.of(3 * rows @ turn, labels)), name

"""rho and the second negative of mined tuples."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from dml.miners import MINERS
from dml.pairs import Pairs
from dml.tuples import Tuples, rho, second_negative

LABELS = torch.tensor([2, 0, 1, 2, 2, 0, 1, 1, 0, 3, 4, 4])


def pairs_of(labels: torch.Tensor = LABELS, key: tuple[int, int] = (0, 0)) -> Pairs:
    return Pairs.of(torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(0)), labels, key=key)


def test_rho_makes_the_anchor_its_positive_and_the_positive_a_negative() -> None:
    pairs = pairs_of()
    tuples = MINERS["n_pair"]()(pairs)
    anchor, positive, negative = rho(pairs, tuples, 1.0)
    assert torch.equal(anchor, tuples.anchor)
    assert torch.equal(positive, tuples.anchor)
    assert torch.equal(negative, tuples.positive)
    assert rho(pairs, tuples, 0.0) == tuples


@pytest.mark.parametrize("name", ["random", "n_pair"])
def test_rho_rewrites_a_share_p_of_the_tuples_and_leaves_the_others(name: str) -> None:
    changed = total = 0
    for step in range(400):
        pairs = pairs_of(key=(1, step))
        tuples = MINERS[name]()(pairs)
        found = rho(pairs, tuples, 0.3)
        switched = found.positive == found.anchor
        assert torch.equal(found.positive[~switched], tuples.positive[~switched])
        assert torch.equal(found.negative[~switched], tuples.negative[~switched])
        assert torch.equal(found.negative[switched], tuples.positive[switched])
        changed, total = changed + int(switched.sum()), total + len(switched)
    assert changed / total == pytest.approx(0.3, abs=0.03)


def test_the_draws_of_rho_belong_to_the_row_not_to_the_rank() -> None:
    whole = pairs_of()
    tuples = MINERS["n_pair"]()(whole)
    last = replace(whole, rows=whole.rows[5:], row_labels=whole.row_labels[5:], row_offset=5)
    kept = tuples.anchor >= 5
    local = Tuples(tuples.anchor[kept] - 5, tuples.positive[kept], tuples.negative[kept])
    expected = rho(whole, tuples, 0.5)
    found = rho(last, local, 0.5)
    assert torch.equal(found.anchor + 5, expected.anchor[kept])
    assert torch.equal(found.positive, expected.positive[kept])
    assert torch.equal(found.negative, expected.negative[kept])
    for ours, theirs in zip(second_negative(last, found), second_negative(whole, expected), strict=True):
        assert torch.equal(ours, theirs[kept])


def test_the_second_negative_is_of_a_third_class_each_of_its_samples_alike() -> None:
    counts: Counter[int] = Counter()
    for step in range(3000):
        pairs = pairs_of(key=(2, step))
        column, exists = second_negative(pairs, Tuples(*(torch.tensor([x]) for x in (6, 2, 10))))
        assert exists.all()
        counts[int(column)] += 1
    assert set(counts) == {0, 1, 3, 4, 5, 8, 9}, "all but the classes 1 and 4"
    assert all(count / 3000 == pytest.approx(1 / 7, abs=0.03) for count in counts.values())


def test_after_rho_the_second_negative_is_of_any_other_class() -> None:
    tuples = Tuples(*(torch.tensor([x]) for x in (6, 6, 2)))
    found = {int(second_negative(pairs_of(key=(2, step)), tuples)[0]) for step in range(300)}
    assert found == {0, 1, 3, 4, 5, 8, 9, 10, 11}


def test_two_classes_have_no_second_negative() -> None:
    pairs = pairs_of(torch.tensor([0, 0, 1, 1]))
    column, exists = second_negative(pairs, MINERS["random"]()(pairs))
    assert not exists.any()
    assert ((column >= 0) & (column < 4)).all()

"""Pairs of one process: what is a positive, what a negative, and what a mean."""

from dataclasses import replace

import pytest
import torch

from dml.memory import Memory
from dml.pairs import Pairs


def test_positives_are_other_samples_of_the_class_and_negatives_all_other_classes() -> None:
    pairs = Pairs.of(torch.eye(4), torch.tensor([0, 0, 1, 1]))
    assert pairs.positives.int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    assert pairs.negatives.int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]]


def test_a_sample_that_is_in_the_batch_twice_is_no_pair_with_itself() -> None:
    ids, memory = torch.tensor([7, 8, 7, 9]), Memory(3, 4)
    memory.add(torch.eye(4)[:3], torch.tensor([0, 0, 0]), torch.tensor([5, 5, 8]))
    pairs = Pairs.of(torch.eye(4), torch.tensor([0, 0, 0, 1]), ids_B=ids, memory=memory)
    assert pairs.positives.int().tolist() == [[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert pairs.negatives.int().tolist() == [[0, 0, 0, 1]] * 3 + [[1, 1, 1, 0]]
    further = pairs.extended.positives[:, 4:].int().tolist()
    assert pairs.extended.positives[:, :4].equal(pairs.positives)
    assert further == [[1, 1, 0]] * 3 + [[0, 0, 0]], "of the memory, id 8 is in the batch"


def test_similarity_is_the_cosine_whatever_the_length() -> None:
    rows = torch.tensor([[3.0, 4.0], [4.0, 3.0], [-3.0, -4.0]])
    expected = torch.tensor([[1, 0.96, -1], [0.96, 1, -0.96], [-1, -0.96, 1]])
    torch.testing.assert_close(Pairs.of(rows, torch.tensor([0, 0, 1])).similarity, expected)


def test_half_precision_is_widened_before_it_is_compared() -> None:
    rows = torch.randn(6, 4).bfloat16()
    assert Pairs.of(rows, torch.zeros(6, dtype=torch.int64)).similarity.dtype == torch.float32


def test_a_mean_over_nothing_is_zero() -> None:
    pairs = Pairs.of(torch.eye(2), torch.tensor([0, 1]))
    assert float(pairs.mean(torch.tensor(0.0), 0)) == 0.0
    assert float(pairs.mean(torch.tensor(6.0), 4)) == 1.5


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        (torch.zeros(3), torch.zeros(3), r"needs embeddings \(B, D\) and labels \(B,\), got \(3,\) and \(3,\)"),
        (torch.ones(3, 2), torch.zeros(4, dtype=torch.int64), r"got \(3, 2\) and \(4,\)"),
        (torch.ones(3, 2), torch.zeros(3), "labels must be integers, got torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(rows: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pairs.of(rows, labels)


def test_ids_that_do_not_fit_are_refused() -> None:
    rows, labels = torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"needs an id for each label, got \(2,\) and \(3,\)"):
        Pairs.of(rows, labels, ids_B=torch.arange(2))
    with pytest.raises(ValueError, match="ids must be integers, got torch"):
        Pairs.of(rows, labels, ids_B=torch.zeros(3))


def test_draws_belong_to_key_stream_and_global_row() -> None:
    rows, labels = torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)
    pairs = Pairs.of(rows, labels, key=(3, 8))
    whole = pairs.draws(1, 4)
    assert whole.dtype == torch.float64
    assert ((whole >= 0) & (whole < 1)).all()
    assert torch.equal(pairs.draws(1, 2), whole[:, :2])
    later = replace(pairs, rows=rows[3:], row_labels=labels[3:], row_offset=3)
    assert torch.equal(later.draws(1, 4), whole[3:])
    others = [pairs.draws(2, 4), replace(pairs, key=(3, 9)).draws(1, 4), replace(pairs, key=(4, 8)).draws(1, 4)]
    assert all((other != whole).all() for other in others)


def test_similarity_of_columns_is_that_of_their_embeddings() -> None:
    pairs = Pairs.of(torch.randn(6, 4), torch.zeros(6, dtype=torch.int64))
    first, second = torch.tensor([5, 0, 5, 2]), torch.tensor([1, 0, 2, 5])
    expected = (pairs.cols[first] * pairs.cols[second]).sum(1)
    torch.testing.assert_close(pairs.similarity_of(first, second), expected)

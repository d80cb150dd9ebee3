from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dml.config import BatchConfig
from dml.data import sampler

ragged = st.lists(st.integers(2, 9), min_size=2, max_size=25)


def labels_of(sizes: list[int]) -> np.ndarray:
    """Labels in a scattered order, as a dataset may bring them."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return labels[np.random.default_rng(0).permutation(len(labels))]


@settings(max_examples=60, deadline=None)
@given(ragged, st.data())
def test_every_batch_holds_p_classes_with_k_samples_each(sizes: list[int], data: st.DataObject) -> None:
    labels = labels_of(sizes)
    batch = BatchConfig(classes=data.draw(st.integers(2, len(sizes))), samples=data.draw(st.integers(2, 12)))
    for row in sampler.plan(labels, batch, seed=3, epoch=1, steps=7):
        by_class = Counter(labels[row].tolist())
        assert len(by_class) == batch.classes
        assert set(by_class.values()) == {batch.samples}
        for label in by_class:
            repeats = Counter(row[labels[row] == label].tolist())
            fewest, most = batch.samples // sizes[label], -(-batch.samples // sizes[label])
            assert set(repeats.values()) <= {max(fewest, 1), most}, "repeats only where K exceeds the class, and evenly"
            if batch.samples >= sizes[label]:
                assert len(repeats) == sizes[label]


@settings(max_examples=40, deadline=None)
@given(ragged, st.integers(2, 6))
def test_every_class_comes_before_any_comes_again(sizes: list[int], per_batch: int) -> None:
    batch = BatchConfig(classes=min(per_batch, len(sizes)), samples=2)
    labels = labels_of(sizes)
    plan = sampler.plan(labels, batch, seed=0, epoch=0, steps=40)
    order = labels[plan].reshape(40, batch.classes, 2)[:, :, 0].ravel()
    whole_rounds = order[: len(order) // len(sizes) * len(sizes)].reshape(-1, len(sizes))
    for one_round in whole_rounds:
        assert sorted(one_round.tolist()) == list(range(len(sizes)))


def test_samples_of_a_class_are_used_evenly_over_an_epoch() -> None:
    sizes = [2, 5, 9, 30]
    labels = labels_of(sizes)
    plan = sampler.plan(labels, BatchConfig(classes=2, samples=4), seed=0, epoch=0, steps=50)
    counts = np.bincount(plan.ravel(), minlength=len(labels))
    for label in range(len(sizes)):
        assert np.ptp(counts[labels == label]) <= 1


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(("classes", "samples"), [(2, 2), (5, 3), (8, 4), (7, 7)])
def test_the_ranks_slices_in_order_are_the_global_batch(world: int, classes: int, samples: int) -> None:
    labels = labels_of([6] * 12)
    batch = BatchConfig(classes=classes, samples=samples)
    row = sampler.plan(labels, batch, seed=0, epoch=0, steps=1)[0]
    slices = [sampler.rank_slice(row, rank, world) for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate(slices), row)
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_more_ranks_than_images_leave_some_with_none() -> None:
    slices = [sampler.rank_slice(np.arange(2), rank, 5) for rank in range(5)]
    assert sorted(map(len, slices)) == [0, 0, 0, 1, 1]


def test_a_step_does_not_depend_on_how_many_follow() -> None:
    labels, batch = labels_of([3, 4, 5, 6, 7]), BatchConfig(classes=3, samples=2)
    long = sampler.plan(labels, batch, seed=5, epoch=2, steps=30)
    np.testing.assert_array_equal(sampler.plan(labels, batch, seed=5, epoch=2, steps=4), long[:4])
    assert sampler.plan(labels, batch, seed=5, epoch=2, steps=0).shape == (0, 6)


def test_seeds_and_epochs_give_other_batches() -> None:
    labels, batch = labels_of([10] * 20), BatchConfig(classes=5, samples=2)
    plans = {
        sampler.plan(labels, batch, seed=seed, epoch=epoch, steps=3).tobytes()
        for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]
    }
    assert len(plans) == 4


def test_rounds_do_not_bring_the_same_classes_together_again() -> None:
    plan = sampler.plan(labels_of([20] * 12), BatchConfig(classes=4, samples=2), seed=0, epoch=0, steps=9)
    labels = labels_of([20] * 12)
    together = {frozenset(labels[row].tolist()) for row in plan}
    assert len(together) == 9


def test_steps_cover_the_images_once() -> None:
    assert sampler.steps_per_epoch(np.zeros(128, dtype=np.int64), BatchConfig(classes=32, samples=4)) == 1
    assert sampler.steps_per_epoch(np.zeros(129, dtype=np.int64), BatchConfig(classes=32, samples=4)) == 2


def test_too_few_classes_are_refused_with_the_number_there_is() -> None:
    with pytest.raises(ValueError, match=r"batch\.classes is 5, but there are 3 classes"):
        sampler.plan(labels_of([4, 4, 4]), BatchConfig(classes=5), seed=0, epoch=0, steps=1)

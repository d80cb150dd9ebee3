import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dml.config import BatchConfig
from dml.data import sampler
from tests.contracts.sampler_contract import EmbeddingContract, PlainContract, labels_of

ragged = st.lists(st.integers(2, 9), min_size=2, max_size=25)


class TestPK(PlainContract):
    name = "pk"


class TestSPC(PlainContract):
    name = "spc"


class TestRandom(PlainContract):
    name, grouped = "random", False


class TestGreedyCoreset(EmbeddingContract):
    name = "greedy_coreset"


class TestD2Coreset(EmbeddingContract):
    name = "d2_coreset"


class TestDHM(EmbeddingContract):
    name = "dhm"


def test_every_sampler_has_a_contract_test() -> None:
    tested = {test.name for test in globals().values() if isinstance(test, type) and hasattr(test, "name")}
    assert tested == set(sampler.SAMPLERS)


def test_an_unknown_sampler_is_named_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown batch\.sampler 'p_k'; valid: pk, spc, random, greedy_coreset"):
        sampler.plan(labels_of([4, 4]), BatchConfig(classes=2, sampler="p_k"), seed=0, epoch=0, steps=1)


@settings(max_examples=60, deadline=None)
@given(ragged, st.data())
def test_every_batch_of_pk_holds_p_classes_with_k_samples_each(sizes: list[int], data: st.DataObject) -> None:
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


def test_more_ranks_than_images_leave_some_with_none() -> None:
    slices = [sampler.rank_slice(np.arange(2), rank, 5) for rank in range(5)]
    assert sorted(map(len, slices)) == [0, 0, 0, 1, 1]


def test_rounds_do_not_bring_the_same_classes_together_again() -> None:
    plan = sampler.plan(labels_of([20] * 12), BatchConfig(classes=4, samples=2), seed=0, epoch=0, steps=9)
    labels = labels_of([20] * 12)
    together = {frozenset(labels[row].tolist()) for row in plan}
    assert len(together) == 9


def test_steps_cover_the_images_once() -> None:
    assert sampler.steps_per_epoch(np.zeros(128, dtype=np.int64), BatchConfig(classes=32, samples=4)) == 1
    assert sampler.steps_per_epoch(np.zeros(129, dtype=np.int64), BatchConfig(classes=32, samples=4)) == 2


def test_a_class_that_is_too_small_is_named_where_names_are_known() -> None:
    batch = BatchConfig(classes=2, samples=4, small_classes="refuse")
    with pytest.raises(
        ValueError, match=r"1 of 3 classes .* batch\.samples 4 images, such as 'wren' with 3; valid: batch"
    ):
        sampler.check(labels_of([4, 3, 9]), batch, ("kite", "wren", "gull"))


def test_random_brings_every_image_before_any_again_whatever_the_classes() -> None:
    labels = labels_of([2, 30, 5])
    plan = sampler.plan(labels, BatchConfig(classes=2, samples=5, sampler="random"), seed=0, epoch=0, steps=37)
    rounds = plan.ravel().reshape(10, 37)
    for images in rounds:
        assert sorted(images.tolist()) == list(range(37))


def test_spc_draws_classes_and_samples_uniformly_and_forgets_the_steps_before() -> None:
    labels = labels_of([6] * 12)
    plan = sampler.plan(labels, BatchConfig(classes=3, samples=2, sampler="spc"), seed=0, epoch=0, steps=2000)
    classes_SP = labels[plan].reshape(2000, 3, 2)[:, :, 0]
    per_class = np.bincount(classes_SP.ravel(), minlength=12)
    # Binomial(2000, 1/4): its standard deviation is 19.4.
    assert np.abs(per_class - 500).max() < 5 * 19.4
    per_image = np.bincount(plan.ravel(), minlength=72)
    assert np.abs(per_image - 2000 / 12).max() < 5 * np.sqrt(2000 / 12)
    again = np.mean([len(set(a) & set(b)) for a, b in itertools.pairwise(classes_SP)])
    assert again == pytest.approx(3 * 3 / 12, abs=0.06), "a class comes again as if the step before had not been"


def test_spc_leaves_classes_out_of_an_epoch_where_pk_does_not() -> None:
    labels = labels_of([4] * 100)
    found = {}
    for name in ("pk", "spc"):
        plan = sampler.plan(labels, BatchConfig(classes=4, samples=4, sampler=name), seed=0, epoch=0, steps=25)
        found[name] = len(np.unique(labels[plan]))
    assert found["pk"] == 100
    assert found["spc"] == pytest.approx(100 * (1 - 0.96**25), abs=12), "(1 - P/C)^S of the classes are in no batch"

"""The cross-batch memory against a plain list, and as the further columns of a Pairs."""

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dml import losses
from dml.losses.tcm import TCM
from dml.memory import Memory
from dml.miners import MINERS
from dml.pairs import Pairs

TAKERS = sorted(
    name for name, cls in losses.LOSSES.items() if cls.takes_memory and not cls.needs - {"num_classes", "dim"}
)


def batch(ids: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit rows, labels (id modulo 3) and ids."""
    rows = torch.randn(len(ids), 6, generator=torch.Generator().manual_seed(seed))
    known = torch.tensor(ids, dtype=torch.int64)
    return rows / rows.norm(dim=1, keepdim=True), known % 3, known


@given(size=st.integers(1, 9), counts=st.lists(st.integers(0, 12), max_size=8))
@settings(max_examples=100, deadline=None)
def test_the_ring_holds_the_last_embeddings_of_a_queue(size: int, counts: list[int]) -> None:
    memory, queue, seen = Memory(size, 6), deque[tuple[int, int, list[float]]](maxlen=size), 0
    for count in counts:
        rows, labels, ids = batch(list(range(seen, seen + count)), seed=seen)
        memory.add(rows, labels, ids)
        queue.extend(zip(ids.tolist(), labels.tolist(), rows.tolist(), strict=True))
        seen += count
    kept = sorted(
        entry
        for entry in zip(memory.ids.tolist(), memory.labels.tolist(), memory.embeddings.tolist(), strict=True)
        if entry[0] >= 0
    )
    assert kept == sorted(queue)
    assert int(memory.written) == seen


def test_its_state_goes_on_where_it_was_saved() -> None:
    memory, again = Memory(5, 6), Memory(5, 6)
    memory.add(*batch([1, 2, 3]))
    again.load_state_dict(memory.state_dict())
    for one in (memory, again):
        one.add(*batch([4, 5, 6], seed=1))
    assert memory.ids.tolist() == [6, 2, 3, 4, 5]
    for name, value in memory.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_what_it_keeps_has_no_gradient() -> None:
    memory = Memory(4, 6)
    rows, labels, ids = batch([0, 1])
    memory.add(rows.requires_grad_() * 1, labels, ids)
    assert not memory.embeddings.requires_grad


def remembering(stored: list[int], present: list[int], size: int = 8) -> Pairs:
    memory = Memory(size, 6)
    memory.add(*batch(stored, seed=1))
    rows, labels, ids = batch(present, seed=2)
    return Pairs.of(rows, labels, ids_B=ids, memory=memory)


def test_its_embeddings_are_further_columns_and_tcm_never_sees_them() -> None:
    pairs = remembering(stored=[10, 11, 12, 13], present=[0, 1, 3])
    wide = pairs.extended
    assert pairs.similarity.shape == (3, 3)
    assert wide.similarity.shape == (3, 3 + 8)
    torch.testing.assert_close(wide.similarity[:, :3], pairs.similarity)
    torch.testing.assert_close(wide.similarity[:, 3:7], pairs.rows @ pairs.memory.embeddings[:4].T)
    # Labels are ids modulo 3, and four places are empty still.
    assert wide.positives.int().tolist() == [
        [0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0],
    ]
    assert wide.negatives[1].int().tolist() == [1, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0]
    tcm = TCM(0.9, 0.1)
    assert torch.equal(tcm(pairs), tcm(Pairs.of(pairs.rows, pairs.row_labels)))


def test_stale_copies_of_the_batchs_own_samples_are_nobodys_positive_or_negative() -> None:
    wide = remembering(stored=[3, 10, 0, 11], present=[0, 1, 3]).extended
    seen = wide.positives | wide.negatives
    assert not seen[:, [3, 5]].any(), "ids 3 and 0"
    assert seen[:, [4, 6]].all(), "ids 10 and 11"


def test_without_a_memory_the_extended_pairs_are_the_pairs() -> None:
    pairs = Pairs.of(*batch([0, 1, 2])[:2])
    assert pairs.extended is pairs


@pytest.mark.parametrize("name", MINERS)
def test_miners_take_from_it_and_never_a_column_that_does_not_count(name: str) -> None:
    wide = remembering(stored=list(range(6, 30)), present=list(range(12)), size=32).extended
    tuples = MINERS[name]()(wide)
    assert len(tuples.anchor)
    assert wide.positives[tuples.anchor, tuples.positive].all()
    assert wide.negatives[tuples.anchor, tuples.negative].all()
    if name != "multi_similarity":
        assert (torch.cat(tuples[1:]) >= 12).any()


@pytest.mark.parametrize("name", TAKERS)
def test_an_empty_memory_changes_no_loss(name: str) -> None:
    rows, labels, ids = batch(list(range(12)))
    needs = {"num_classes": 3, "dim": 6}
    loss = losses.build(name, **{need: needs[need] for need in losses.LOSSES[name].needs})
    alone = Pairs.of(rows, labels, ids_B=ids)
    remembered = Pairs.of(rows, labels, ids_B=ids, memory=Memory(5, 6))
    torch.testing.assert_close(loss(remembered.extended), loss(alone))


@pytest.mark.parametrize("name", TAKERS)
def test_a_full_memory_counts_and_its_gradient_goes_to_the_batch_alone(name: str) -> None:
    rows, labels, ids = batch(list(range(12)))
    needs = {"num_classes": 3, "dim": 6}
    loss = losses.build(name, **{need: needs[need] for need in losses.LOSSES[name].needs})
    memory = Memory(30, 6)
    memory.add(*batch(list(range(12, 42)), seed=5))
    rows.requires_grad_()
    value = loss(Pairs.of(rows, labels, ids_B=ids, memory=memory).extended)
    value.backward()
    assert torch.isfinite(rows.grad).all()
    assert rows.grad.abs().max() > 0
    assert not torch.isclose(value, loss(Pairs.of(rows, labels)))


@pytest.mark.parametrize(("size", "dim"), [(0, 3), (3, 0)])
def test_a_memory_of_nothing_is_refused(size: int, dim: int) -> None:
    with pytest.raises(ValueError, match=f"size and dim must be at least 1, got {size} and {dim}"):
        Memory(size, dim)


def test_a_memory_needs_ids() -> None:
    with pytest.raises(ValueError, match="a memory needs ids_B"):
        Pairs.of(*batch([0, 1])[:2], memory=Memory(3, 6))

"""1, 2 and 4 ranks find what one process finds, to the bit."""

import hashlib

import numpy as np
import pytest
import torch

from dml.metrics import neighbours
from dml.metrics.retrieval import recall_at_k, retrieval
from tests.ddp import ranks


def cases():
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(150, 6, generator=generator)
    spread = torch.randint(0, 40, (150,), generator=generator)
    huge = torch.where(torch.arange(150) % 5 > 0, 99, spread)
    tied = torch.eye(6)[torch.arange(150) % 6]
    few = rows[:5], torch.tensor([0, 0, 1, 1, 2])
    yield from ((rows, spread, None), (rows, huge, None), (tied, spread, None), (*few, None))
    yield rows[:70], spread[:70], (rows[70:], spread[70:])


def measure(rank, world, alone=False):
    # Small limits, so that several chunks, both searches and ranks without a chunk occur.
    neighbours.QUERIES, neighbours.FAISS_K, neighbours.ENTRIES = 16, 60, 2000
    group = None if alone else torch.distributed.group.WORLD
    found = []
    for rows, labels, gallery in cases():
        whole = retrieval(rows, labels, gallery=gallery, map_at=20, group=group)
        every_value = hashlib.sha256(np.stack(list(whole.values.values())).tobytes()).hexdigest()
        found.append((every_value, whole.means(), recall_at_k(rows, labels, gallery=gallery, group=group)))
    return found


@pytest.fixture
def alone(monkeypatch):
    for name in ("QUERIES", "FAISS_K", "ENTRIES"):
        monkeypatch.setattr(neighbours, name, getattr(neighbours, name))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield measure(0, 1, alone=True)
    torch.set_num_threads(threads)


def test_ranks_find_what_one_process_finds(alone):
    assert all(means["queries"] > 0 for _, means, _ in alone)
    for world in (1, 2, 4):
        for found in ranks.run(world, measure):
            assert found == alone

"""The pace of training: images a second, and the share of the time that went into waiting for them."""

import time
from collections.abc import Iterator

import pytest
import torch

from dml.data.loader import Batch
from dml.pace import Mark, Pace


def slow(batches: int, seconds: float) -> Iterator[Batch]:
    for _ in range(batches):
        time.sleep(seconds)
        yield Batch(torch.zeros(1), torch.zeros(1), torch.zeros(1))


def test_batches_pass_through_and_their_time_counts() -> None:
    pace = Pace()
    began = pace.mark()
    given = list(slow(5, 0))
    assert list(pace.waiting(given)) == given
    assert pace.mark().batches - began.batches == 5


def test_waiting_is_what_the_loader_takes_and_not_what_the_step_takes() -> None:
    pace = Pace()
    for _ in pace.waiting(slow(3, 0.05)):
        time.sleep(0.01)
    assert pace.mark().waited >= 0.15
    quick = Pace()
    began = quick.mark()
    for _ in quick.waiting(slow(3, 0.0)):
        time.sleep(0.05)
    ended = quick.mark()
    assert ended.waited <= ended.seconds - began.seconds - 0.15


def test_rates_are_since_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace()
    monkeypatch.setattr(pace, "mark", lambda: Mark(seconds=14.0, waited=3.0, batches=9))
    found = pace.since(Mark(seconds=10.0, waited=2.0, batches=4), batch=48)
    assert found == {"train/images_per_second": 5 * 48 / 4, "train/data_wait": 0.25}

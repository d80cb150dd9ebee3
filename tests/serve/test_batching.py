"""Batches between requests, with a model in the test's hands."""

import asyncio
import threading
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from serve.batching import Backlog, Batcher
from serve.limits import Limits
from serve.schemas import ApiError
from tests.serve.pictures import MeanColour


class Counting(MeanColour):
    """Embeds a number as itself; notes its batches; waits until it may run."""

    batch = 4

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.taken = threading.Event()
        self.free = threading.Event()

    def embed(self, inputs: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        self.taken.set()
        assert self.free.wait(20)
        numbers = [float(one) for one in inputs]
        self.batches.append(numbers)
        if -1 in numbers:
            raise RuntimeError("broken")
        return np.float32(numbers)[:, None]


async def _run(
    batcher: Batcher, jobs: Sequence[tuple[Counting, list[float]]], cancelled: Sequence[int] = ()
) -> list[object]:
    """The first job goes in alone and holds the model until all others wait."""
    tasks = []
    for model, numbers in jobs:
        tasks.append(asyncio.create_task(batcher.embed(model, [torch.tensor(number) for number in numbers])))
        assert await asyncio.to_thread(jobs[0][0].taken.wait, 20)
    for index in cancelled:
        tasks[index].cancel()
    await asyncio.sleep(0.02)
    for model, _ in jobs:
        model.free.set()
    return list(await asyncio.gather(*tasks, return_exceptions=True))


@pytest.fixture
def batcher() -> Batcher:
    made = Batcher()
    made.start()
    return made


def rows(answers: Sequence[object]) -> list[list[float]]:
    return [answer[:, 0].tolist() for answer in answers if isinstance(answer, np.ndarray)]


def test_what_waits_goes_together_and_everyone_gets_their_own(batcher: Batcher) -> None:
    model = Counting()
    jobs = [[0.0], [1.0], [2.0, 3.0], [4.0, 5.0], [6, 7, 8, 9, 10], [11.0]]
    answers = asyncio.run(_run(batcher, [(model, job) for job in jobs]))
    assert rows(answers) == jobs
    assert model.batches == [[0], [1, 2, 3], [4, 5], [6, 7, 8, 9, 10], [11]], "in order, whole, up to the batch"
    batcher.stop()


def test_two_models_are_never_mixed(batcher: Batcher) -> None:
    old, new = Counting(), Counting()
    asyncio.run(_run(batcher, [(old, [0.0]), (old, [1.0]), (new, [2.0]), (new, [3.0])]))
    assert (old.batches, new.batches) == ([[0], [1]], [[2, 3]])
    batcher.stop()


def test_a_client_that_left_costs_nothing(batcher: Batcher) -> None:
    model = Counting()
    answers = asyncio.run(_run(batcher, [(model, [0.0]), (model, [1.0]), (model, [2.0])], cancelled=[1]))
    assert isinstance(answers[1], asyncio.CancelledError)
    assert model.batches == [[0], [2]]
    batcher.stop()


def test_an_error_goes_to_its_batch_and_no_further(batcher: Batcher) -> None:
    model = Counting()
    answers = asyncio.run(_run(batcher, [(model, [-1.0]), (model, [1.0])]))
    assert isinstance(answers[0], RuntimeError)
    assert rows(answers[1:]) == [[1]]
    assert (batcher.alive, batcher.failures) == (True, 0)
    batcher.stop()
    assert not batcher.alive


def test_the_end_waits_for_what_was_asked(batcher: Batcher) -> None:
    model = Counting()
    model.free.set()

    async def last() -> npt.NDArray[np.float32]:
        asked = asyncio.create_task(batcher.embed(model, [torch.tensor(5.0)]))
        await asyncio.sleep(0)
        await asyncio.to_thread(batcher.stop)
        return await asked

    assert asyncio.run(last()).tolist() == [[5.0]]


def test_a_backlog_that_would_take_too_long_is_refused() -> None:
    backlog = Backlog(Limits(images=4, wait_seconds=1e-9))
    with backlog.admitted(4), backlog.admitted(4):
        with pytest.raises(ApiError) as refused, backlog.admitted(1):
            pytest.fail("8 images wait, and it may take no time")
        assert (refused.value.status, refused.value.code) == (503, "overloaded")
        assert refused.value.message.startswith("overloaded: 8 images")
    with backlog.admitted(400):
        pass
    generous = Backlog(Limits(images=4, wait_seconds=1000))
    with generous.admitted(4):
        pass
    with generous.admitted(5), generous.admitted(5), generous.admitted(5):
        pass


class Paced:
    """A backlog of half a second, through which 64 images have gone at 100 a second; requests enter and leave it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.backlog = Backlog(Limits(images=64, wait_seconds=0.5), lambda: self.now)
        with self.enter(64):
            self.now += 0.64

    def enter(self, images: int) -> ExitStack:
        request = ExitStack()
        request.enter_context(self.backlog.admitted(images))
        return request

    def refuses(self, images: int) -> bool:
        """Whether one waits too long behind so many."""
        with self.enter(images):
            try:
                self.enter(1).close()
            except ApiError:
                return True
        return False


def test_requests_without_images_say_nothing_of_the_pace() -> None:
    paced = Paced()
    with paced.enter(64):
        for _ in range(9):
            with paced.enter(0):
                paced.now += 0.001
        assert paced.refuses(1)


def test_images_that_were_refused_are_not_of_the_pace() -> None:
    paced = Paced()
    refused = paced.enter(64)
    with paced.enter(1):
        with pytest.raises(ValueError, match="bad"), refused:
            raise ValueError("bad")
        paced.now += 0.1
    assert paced.refuses(65)


@pytest.mark.parametrize(("images", "too_many"), [(300, False), (350, True)])
def test_images_that_others_had_embedded_meanwhile_are(images: int, too_many: bool) -> None:
    paced = Paced()
    before = paced.enter(64)
    paced.now += 0.6
    with paced.enter(1):
        before.close()
        paced.now += 0.1
    assert paced.refuses(images) == too_many, "65 in a tenth of a second"


def test_a_request_that_fails_leaves_nothing_in_the_backlog() -> None:
    backlog = Backlog(Limits(images=1, wait_seconds=1e-9))
    for _ in range(3):
        with pytest.raises(ValueError, match="bad"), backlog.admitted(10):
            raise ValueError("bad")
    with backlog.admitted(10):
        pass

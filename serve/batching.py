"""Batches between requests: what arrives while the model runs goes through it together next.

Ray Serve's own `@serve.batch` closes a batch by the clock, while the model may still be busy with the one before: with
a wait of 0 requests that come one by one are batches of their own, and any other wait is added to the latency of a
service with one client. Here a batch is closed when the model is free (benchmarks/serve_batching.py compares them).
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from serve import access
from serve.gate import overloaded
from serve.limits import Limits
from serve.model import Embedder

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Job:
    model: Embedder
    inputs: Sequence[Tensor]
    done: "Future[Rows]" = field(default_factory=Future)


class Batcher:
    """One thread that runs the model, on the images of as many waiting requests as its batch holds."""

    def __init__(self) -> None:
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self.failures = 0
        """Forward passes that have failed since the last one that did not."""
        self._thread = threading.Thread(target=self._run, name="embed", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, when all that waits has been embedded."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    async def embed(self, model: Embedder, inputs: Sequence[Tensor]) -> Rows:
        """Embeddings (B, D) of decoded images; cancelled before its turn, it costs nothing."""
        job = _Job(model, inputs)
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()
        return await asyncio.wrap_future(job.done)

    def _run(self) -> None:
        while jobs := self._next():
            inputs = [image for job in jobs for image in job.inputs]
            access.count_batch(len(inputs))
            try:
                embeddings_BD = jobs[0].model.embed(inputs)
            except Exception as error:  # whatever torch raises goes to those who asked
                self.failures += 1
                for job in jobs:
                    job.done.set_exception(error)
                continue
            self.failures = 0
            start = 0
            for job in jobs:
                job.done.set_result(embeddings_BD[start : start + len(job.inputs)])
                start += len(job.inputs)

    def _next(self) -> list[_Job]:
        """Waits for work, and takes requests of one model, in order, as long as they fit; empty at the end."""
        with self._changed:
            taken: list[_Job] = []
            size = 0
            while not taken:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if not self._waiting:
                    return []
                while self._waiting:
                    job = self._waiting[0]
                    full = size + len(job.inputs) > job.model.batch
                    if taken and (full or job.model is not taken[0].model):
                        break
                    self._waiting.popleft()
                    if job.done.set_running_or_notify_cancel():  # else its client has left
                        taken.append(job)
                        size += len(job.inputs)
            return taken


class Backlog:
    """How long the images before a request's would take, by how fast those before went.

    Args:
        limits: `wait_seconds`, beyond which a request is refused; as many images as one request may carry are let in
            whatever the rate.
        clock: seconds.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.perf_counter) -> None:
        self._limits = limits
        self._clock = clock
        self._pending = 0
        self._done = 0
        self._rate = 0.0

    @contextmanager
    def admitted(self, images: int) -> Iterator[None]:
        """Counts a request's images in, and out again.

        Raises:
            ApiError: 503, it would wait too long; for how long.
        """
        before = self._pending
        if before > self._limits.images and before > self._rate * self._limits.wait_seconds:
            wait = before / self._rate if self._rate else self._limits.wait_seconds
            raise overloaded(f"{before} images would have to be embedded first", retry_after=min(wait, 60))
        self._pending += images
        began, done = self._clock(), self._done
        try:
            yield
            self._done += images
            if images:  # one without waits for none, and would say that all were embedded at once
                # Those before it and its own in this time. Up at once and down slowly: a lull is no slowness.
                rate = (self._done - done) / max(self._clock() - began, 1e-6)
                self._rate = max(rate, 0.9 * self._rate + 0.1 * rate)
        finally:
            self._pending -= images

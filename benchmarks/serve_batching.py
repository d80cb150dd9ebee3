"""Batching between requests, ours beside `@ray.serve.batch`: `python -m benchmarks.serve_batching`.

A model that sleeps 5 ms and 2 ms an image, as an accelerator's curve may look, asked in one Serve replica by 1, 4 and
16 callers with 1 image each, again and again after a random time of 5 ms in the mean, as for decoding. Milliseconds
(median) and images/s.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import ray
import ray.serve
import torch

from cluster import session
from serve.batching import Batcher

BATCH = 16


class Sleeping:
    """A model by its timing alone."""

    batch = BATCH

    def embed(self, inputs: Sequence[Any]) -> Any:
        """Takes its time."""
        time.sleep(0.005 + 0.002 * len(inputs))
        return np.zeros((len(inputs), 4), np.float32)


@ray.serve.deployment(max_ongoing_requests=64)
class Asked:
    """Asks itself, so that nothing but the batching is in the way."""

    def __init__(self) -> None:
        self.model = Sleeping()
        self.batcher = Batcher()
        self.batcher.start()

    async def ours(self) -> None:
        """By what is waiting when the model is free."""
        await self.batcher.embed(self.model, [torch.zeros(1)])  # type: ignore[arg-type]

    @ray.serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0)
    async def at_once(self, items: list[int]) -> list[int]:
        """By what is there at once."""
        await asyncio.to_thread(self.model.embed, items)
        return items

    @ray.serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.005)
    async def waiting(self, items: list[int]) -> list[int]:
        """By the clock."""
        await asyncio.to_thread(self.model.embed, items)
        return items

    async def measure(self, kind: str, callers: int, seconds: float) -> tuple[float, float]:
        """Median milliseconds of a call, and calls a second."""
        one: dict[str, Callable[[], Awaitable[Any]]] = {
            "ours": self.ours,
            "wait 0": lambda: self.at_once(1),
            "wait 5 ms": lambda: self.waiting(1),
        }
        times: list[float] = []
        until = time.perf_counter() + seconds

        async def caller(seed: int) -> None:
            pauses = np.random.default_rng(seed)
            while time.perf_counter() < until:
                await asyncio.sleep(pauses.exponential(0.005))
                start = time.perf_counter()
                await one[kind]()
                times.append(time.perf_counter() - start)

        await asyncio.gather(*(caller(seed) for seed in range(callers)))
        return statistics.median(times) * 1000, len(times) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    session.connect()
    handle: Any = ray.serve.run(Asked.bind(), name="batching", route_prefix=None)  # type: ignore[attr-defined]
    for callers in (1, 4, 16):
        for kind in ("ours", "wait 0", "wait 5 ms"):
            rounds = [handle.measure.remote(kind, callers, options.seconds).result() for _ in range(options.rounds)]
            milliseconds, rate = (statistics.median(values) for values in zip(*rounds, strict=True))
            print(f"{callers:3} callers  {kind:10} {milliseconds:7.2f} ms  {rate:7.1f} images/s", flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()

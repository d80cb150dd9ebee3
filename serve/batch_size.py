"""How many images one forward pass should take: measured when a model is loaded, which also warms it up."""

import time
from collections.abc import Callable, Mapping

ENOUGH = 0.95
"""Share of the highest rate at which a smaller batch is preferred: whoever waits, waits for less."""


def measure(run: Callable[[int], object], *, most: int, seconds: float = 2.0) -> dict[int, float]:
    """Images a second by batch size, of 1, 2, 4, ... images.

    Args:
        run: embeds so many images.
        most: images of a batch.
        seconds: after which no larger batch is begun.
    """
    rates: dict[int, float] = {}
    began = time.perf_counter()
    size = 1
    while size <= most and (not rates or time.perf_counter() - began < seconds):
        run(size)  # the first pass of a size chooses algorithms and takes memory
        times: list[float] = []
        while len(times) < 3 and (not times or sum(times) < seconds / 10):
            start = time.perf_counter()
            run(size)
            times.append(time.perf_counter() - start)
        rates[size] = size / min(times)
        size *= 2
    return rates


def choose(rates: Mapping[int, float]) -> int:
    """The smallest batch whose rate is near the highest."""
    best = max(rates.values())
    return min(size for size, rate in rates.items() if rate >= ENOUGH * best)

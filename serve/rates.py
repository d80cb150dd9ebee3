"""Rates by key: token buckets, refilled as time goes by."""

import time
from collections import defaultdict
from collections.abc import Callable

from serve.limits import Limits
from serve.schemas import ApiError

BURST_SECONDS = 2.0


class Bucket:
    """A token bucket: holds at most `burst` tokens, gains `rate` a second, and may be drawn below zero.

    Args:
        rate: tokens a second.
        burst: the most it holds; full at first.
        clock: seconds.
    """

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self.burst = burst
        self._clock = clock
        self._level = burst
        self._at = clock()

    def wait(self, tokens: float) -> float:
        """Seconds until it holds so many; 0 when it does."""
        now = self._clock()
        self._level = min(self.burst, self._level + (now - self._at) * self.rate)
        self._at = now
        return max(0.0, (tokens - self._level) / self.rate)

    def draw(self, tokens: float) -> None:
        """Takes so many, whether it holds them or not."""
        self._level -= tokens


class Rates:
    """The rates of every key: requests, refused when there are too many, and images, paid off afterwards.

    How many images a request has is known only when it has been read, so that it is drawn when it is answered, and
    the key's next requests are refused until the bucket is above zero again.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        requests, images = limits.requests_per_second, limits.images_per_second
        self._requests = defaultdict[str, Bucket](lambda: Bucket(requests, max(1.0, requests * BURST_SECONDS), clock))
        self._images = defaultdict[str, Bucket](lambda: Bucket(images, max(1.0, images * BURST_SECONDS), clock))

    def admit(self, key: str) -> None:
        """Counts one request of a key.

        Raises:
            ApiError: 429, the key has asked for more than it may; when to try again.
        """
        for what, bucket, tokens in (("requests", self._requests[key], 1.0), ("images", self._images[key], 1e-9)):
            if (wait := bucket.wait(tokens)) > 0:
                message = f"more than {bucket.rate:g} {what} a second by one key"
                raise ApiError(429, message, code="rate_limited", retry_after=wait)
        self._requests[key].draw(1.0)

    def draw_images(self, key: str, images: int) -> None:
        """Counts the images of a request that was answered."""
        self._images[key].draw(images)

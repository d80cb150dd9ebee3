"""When to try again, and how long to wait before."""

import random
import time
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime

import httpx

from serve.client.errors import detail_of


@dataclass(frozen=True)
class Retries:
    """Exponential back-off with full jitter (Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015).

    Every request may be repeated: those that write to a gallery replace what they wrote before.

    Attributes:
        deadline: seconds that a request may take with all its tries; the last outcome is raised then.
        first: seconds that the first wait is at most; each further one twice as long at most.
        longest: seconds that no wait exceeds, unless the service asks for more by Retry-After.
    """

    deadline: float = 30.0
    first: float = 0.2
    longest: float = 8.0

    def __post_init__(self) -> None:
        for name in ("deadline", "first", "longest"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)!r} is no time; valid: seconds above 0")


@dataclass
class Tries:
    """The tries of one call, from its first on."""

    retries: Retries
    _began: float = field(default_factory=time.monotonic)
    _failed: int = 0

    @property
    def left(self) -> float:
        """Seconds until the deadline, at least 0.001, as a time-out of the next try."""
        return max(0.001, self.retries.deadline - (time.monotonic() - self._began))

    def wait(self, answer: httpx.Response | None) -> float | None:
        """Seconds to wait before the next try; None when this outcome is final, or there is no time for another.

        Args:
            answer: None when there was none.
        """
        if answer is not None and not passing(answer):
            return None
        most = min(self.retries.longest, self.retries.first * 2.0**self._failed)
        self._failed += 1
        seconds = random.uniform(0, most)  # noqa: S311  # spreads load, guards no secret
        asked = retry_after(answer)
        if asked is not None:  # spread beyond it too, or all would come back in one moment
            seconds += asked
        return seconds if seconds < self.left - 0.001 else None


def passing(answer: httpx.Response) -> bool:
    """Whether another try may fare better: too fast, not ready, or an error of something in between."""
    status = answer.status_code
    return status in (429, 503) or (status >= 500 and detail_of(answer) is None)


def retry_after(answer: httpx.Response | None) -> float | None:
    """Seconds that an answer's Retry-After asks for, given as seconds or as a date; None without one."""
    text = answer.headers.get("Retry-After", "").strip() if answer is not None else ""
    if text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return None

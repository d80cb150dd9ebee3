"""How fast training goes, and how much of its time is spent waiting for images."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dml.data.loader import Batch


@dataclass(frozen=True)
class Mark:
    """A moment.

    Attributes:
        seconds: on a clock of its own.
        waited: seconds waited for batches until then.
        batches: that had come until then.
    """

    seconds: float
    waited: float
    batches: int


class Pace:
    """Follows a loader, by the clock."""

    def __init__(self) -> None:
        self._waited, self._batches = 0.0, 0

    def waiting(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; the time until each comes counts as waiting."""
        batches = iter(loader)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - began
            if batch is None:
                return
            self._batches += 1
            yield batch

    def mark(self) -> Mark:
        """Now."""
        return Mark(time.perf_counter(), self._waited, self._batches)

    def since(self, mark: Mark, batch: int) -> dict[str, float]:
        """train/images_per_second, and train/data_wait: the share of the time, in [0, 1], that was spent waiting.

        Args:
            mark: beginning of that time, in the past.
            batch: images of a batch; of the global batch for the pace of all ranks.
        """
        now = self.mark()
        seconds = now.seconds - mark.seconds
        images = (now.batches - mark.batches) * batch
        return {"train/images_per_second": images / seconds, "train/data_wait": (now.waited - mark.waited) / seconds}

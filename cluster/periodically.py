"""Something that is done every few seconds beside a block, on a thread of its own."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def periodically(name: str, every: float, action: Callable[[], None]) -> Iterator[None]:
    """Calls `action` every so many seconds while the block runs; the last call has ended when the block has.

    Args:
        name: of the thread.
        every: seconds between two calls, and before the first.
        action: raises nothing.
    """
    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(every):
            action()

    thread = threading.Thread(target=follow, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()

"""Two locks: many readers or one writer within a process, and one writer of a folder among all processes."""

import fcntl
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


class SharedLock:
    """Held by any number of readers at once, or by one writer alone; a writer that waits goes before new readers."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._waiting = 0
        self._writer = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """As a reader; not to be nested, since a writer may wait in between."""
        with self._changed:
            self._changed.wait_for(lambda: not self._writer and not self._waiting)
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """As the writer."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._writer and not self._readers)
                self._writer = True
            finally:
                self._waiting -= 1
        try:
            yield
        finally:
            with self._changed:
                self._writer = False
                self._changed.notify_all()


class WrittenElsewhereError(ValueError):
    """Another process writes to the folder; the message says which."""


class FolderLock:
    """Makes this process the only writer of a folder, until it ends or lets go.

    Args:
        folder: made when it is not there.
        patience: seconds to wait for a process that has it.

    Raises:
        WrittenElsewhereError: another process still has it.
    """

    def __init__(self, folder: Path, patience: float = 0.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Opened without truncating: what the present writer says of itself must stay readable.
        self._file: IO[str] = (folder / ".lock").open("a+", encoding="utf-8")
        deadline = time.monotonic() + patience
        while not self._taken():
            if time.monotonic() >= deadline:
                self._file.seek(0)
                holder = self._file.read().strip() or "another process"
                self._file.close()
                raise WrittenElsewhereError(
                    f"{folder} is written by {holder}, and one process writes to galleries at a time: "
                    "go through the running service (--url), or stop it first"
                )
            time.sleep(0.1)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {platform.node()}\n")
        self._file.flush()

    def release(self) -> None:
        """Lets go of the folder."""
        self._file.close()

    def _taken(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

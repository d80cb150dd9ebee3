"""What a run has to say, kept on disk until its tracking server has it.

Whoever records never waits: a record is one line of a file, and a thread sends the lines in order. A server that is
away for a while gets them later; after a crash of the process they still stand there.
"""

import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeAlias

Record: TypeAlias = dict[str, Any]
Deliver: TypeAlias = Callable[[list[Record]], None]
"""Sends records in order; raises when the last of them has not arrived. Records may reach it more than once."""

CHUNK = 500
"""Records that are sent together."""
LONGEST_PAUSE = 15.0
"""Seconds between two tries while the server is away, at most."""
INTERVAL = 1.0
"""Seconds between two sendings while it is there: what comes meanwhile travels together."""


class OutboxInUse(RuntimeError):  # noqa: N818  # it is no error to the one who only looks whether there is work
    """Another process, which is alive, records into this folder or sends from it."""


class Outbox:
    """A folder with a queue of records on local disk: appended to by one process at a time, sent from its front.

    `records.jsonl` holds a record a line and only grows; `sent` says how many bytes of it have arrived, and is replaced
    in one piece; `files/` holds what records refer to. A process that dies loses at most the line that it was writing;
    one that dies between sending and marking sends twice.

    Args:
        folder: made when it is missing.
        wait: seconds to wait for another process to let go of it.

    Raises:
        OutboxInUse: it did not.
    """

    def __init__(self, folder: Path, *, wait: float = 0.0) -> None:
        self.folder = folder
        self._locked = _lock(folder / "lock", wait)
        self._records = (folder / "records.jsonl").open("ab")
        self._writing = threading.Lock()
        complete = _complete(folder / "records.jsonl")
        self._records.truncate(complete)
        self._sent = min(_number(folder / "sent"), complete)

    def append(self, record: Record) -> None:
        """Adds a record; when this returns, a crash of the process does not lose it."""
        line = json.dumps(record).encode() + b"\n"
        with self._writing:
            self._records.write(line)
            self._records.flush()

    def unsent(self, most: int) -> tuple[list[Record], int]:
        """The first records that are not marked as sent, at most so many, and the mark that they then get."""
        with (self.folder / "records.jsonl").open("rb") as file:
            file.seek(self._sent)
            lines: list[bytes] = []
            for line in file:
                if not line.endswith(b"\n") or len(lines) == most:
                    break  # half of a line, as it is being written, belongs to the next time
                lines.append(line)
        return [json.loads(line) for line in lines], self._sent + sum(map(len, lines))

    def mark(self, sent: int) -> None:
        """Notes that all records before this mark have arrived."""
        draft = self.folder / "sent.new"
        draft.write_text(str(sent))
        draft.replace(self.folder / "sent")
        self._sent = sent

    @property
    def empty(self) -> bool:
        """True when every record has arrived."""
        return self._sent == (self.folder / "records.jsonl").stat().st_size

    def close(self) -> None:
        """Lets go of the folder, and removes it when everything has arrived."""
        if self.empty:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._records.close()
        self._locked.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Sender:
    """Sends the records of an outbox on a thread of its own, which starts with the first `wake`."""

    def __init__(self, outbox: Outbox, deliver: Deliver) -> None:
        self._outbox, self._deliver = outbox, deliver
        self._new, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._starting = threading.Lock()

    def wake(self) -> None:
        """Says that there is something new."""
        self._new.set()
        with self._starting:
            if self._thread.ident is None:
                self._thread.start()

    def close(self, grace: float) -> None:
        """Tries once more to send what is left and ends the thread; after `grace` seconds it is left to itself."""
        self._closing.set()
        self._new.set()
        if self._thread.ident is not None:
            self._thread.join(grace)

    def _run(self) -> None:
        pause = 0.0
        while True:
            self._new.wait()
            self._new.clear()
            last = self._closing.is_set()
            try:
                send(self._outbox, self._deliver)
                pause = 0.0
            except Exception:  # whatever it is, training goes on and the records are kept
                pause = min(max(1.0, 2 * pause), LONGEST_PAUSE)
                self._new.set()
            if last:
                return
            self._closing.wait(pause or INTERVAL)


def send(outbox: Outbox, deliver: Deliver) -> int:
    """Sends everything that an outbox holds, in order; returns how many records that were.

    Raises:
        Exception: what `deliver` raised; the records before those that it was given are marked as sent.
    """
    count = 0
    while True:
        records, mark = outbox.unsent(CHUNK)
        if not records:
            return count
        deliver(records)
        outbox.mark(mark)
        count += len(records)


def waiting(folder: Path) -> Iterator[Path]:
    """The outboxes under a folder that hold records which have not arrived, oldest first."""
    changed = {}
    for path in folder.glob("*/records.jsonl"):
        with suppress(FileNotFoundError):  # another run's, all of which arrived meanwhile
            changed[path.parent] = path.stat().st_mtime
    yield from filter(holds, sorted(changed, key=changed.__getitem__))


def holds(outbox: Path) -> bool:
    """Whether an outbox holds records which have not arrived; there is none once all have."""
    try:
        return _number(outbox / "sent") < _complete(outbox / "records.jsonl")
    except FileNotFoundError:
        return False


def _lock(path: Path, wait: float) -> Any:
    until = time.monotonic() + wait
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            if time.monotonic() >= until:
                raise OutboxInUse(f"{path.parent} is in use by a run that is alive") from None
            time.sleep(0.1)
            continue
        except OSError:
            return file  # a file system without locks
        # Whoever had it may have removed the folder meanwhile, and then this is the lock of nothing.
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            return file
        file.close()


def _complete(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0

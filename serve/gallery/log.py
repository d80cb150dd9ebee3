"""An append-only file of checksummed frames: what was appended is on the disk when `append` returns.

A frame is MARK, the length and the CRC-32 of its payload (little-endian uint32), and the payload. One is written after
the one before it has reached the disk, so that a crash can damage the last alone, and of that one nobody was told.
"""

import logging
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

log = logging.getLogger(__name__)

HEAD = b"OneThreshold 1\n\0"
"""What every such file begins with."""
MARK = b"\xf1\xa7\x00\xc3"
_FRAME = struct.Struct("<4sII")
LARGEST = 2**30
"""Bytes of a payload at most."""


class DamagedError(ValueError):
    """A file that is no log, or one with a damaged frame before intact ones; nothing was changed in it."""


class Log:
    """The file, open for appending.

    Args:
        path: of a file that `create` or `replace` has made.

    Attributes:
        size: bytes of the file.
        broken: an fsync failed, so that nobody knows whether the last frame is on the disk.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.broken = False
        path.with_suffix(".new").unlink(missing_ok=True)  # of a process that died while it wrote the file anew
        self._file = path.open("r+b", buffering=0)

    def replay(self) -> Iterator[memoryview]:
        """The payloads from the first to the last; a torn last frame is cut off, with a warning.

        Raises:
            DamagedError: the file is no log, or damaged elsewhere than at its end.
        """
        length = os.fstat(self._file.fileno()).st_size
        if length < len(HEAD):
            raise DamagedError(f"{self.path} is no log: it has {length} bytes")
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[: len(HEAD)] != HEAD:
                raise DamagedError(f"{self.path} is no log: it does not begin with {HEAD!r}")
            place = len(HEAD)
            while place < length:
                end = _end(data, place)
                if end is None:
                    self._refuse_if_more(data, place)
                    break
                with memoryview(data)[place + _FRAME.size : end] as payload:
                    yield payload
                place = end
        if place < length:
            log.warning("%s: the last %d bytes were not written whole and are dropped", self.path, length - place)
            self._cut(place)
        self.size = place

    def append(self, payload: bytes) -> None:
        """Adds a frame and waits until it is on the disk; a frame that cannot be written whole leaves nothing behind.

        Raises:
            OSError: the disk is full or fails. After a failed fsync nobody knows what the disk holds, so that nothing
                more is appended until the file is opened anew.
        """
        if self.broken:
            raise OSError(f"{self.path.name}: the disk failed before; restart the service, which reads what is there")
        try:
            _write(self._file.fileno(), _frame(payload), self.size)
        except OSError:
            self._cut(self.size)
            raise
        try:
            os.fsync(self._file.fileno())
        except OSError:
            self.broken = True
            raise
        self.size += _FRAME.size + len(payload)

    def replace(self, payloads: Iterable[bytes]) -> None:
        """Puts these frames in place of all that the file holds, by one rename: the file is the old or the new one.

        Raises:
            OSError: as `append`; the old file is then still there.
        """
        create(self.path, payloads)
        self._file.close()
        self._file = self.path.open("r+b", buffering=0)
        self.size = os.fstat(self._file.fileno()).st_size
        self.broken = False

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _cut(self, length: int) -> None:
        try:
            os.ftruncate(self._file.fileno(), length)
            os.fsync(self._file.fileno())
        except OSError:
            self.broken = True
            raise

    def _refuse_if_more(self, data: mmap.mmap, place: int) -> None:
        """A torn frame is the last one: an intact one after it says that the disk has lost what was on it."""
        found = data.find(MARK, place + 1)
        while found != -1:
            if _end(data, found) is not None:
                raise DamagedError(
                    f"{self.path} is damaged at byte {place:,}, with intact data after it: restore it from a copy"
                )
            found = data.find(MARK, found + 1)


def create(path: Path, payloads: Iterable[bytes] = ()) -> None:
    """Writes a log of these frames under another name, waits for the disk, and renames it to path.

    Raises:
        OSError: the disk is full or fails; what stood at path is still there, and nothing beside it.
    """

    def chunks() -> Iterator[bytes]:
        yield HEAD
        yield from map(_frame, payloads)

    write_file(path, chunks())
    sync_folder(path.parent)


def write_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Writes a file under another name, waits for the disk, and renames it to path; `sync_folder` makes that last.

    Raises:
        OSError: as `create`.
    """
    new = path.with_suffix(".new")
    try:
        with new.open("wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:  # half a file would keep a full disk full
        new.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _frame(payload: bytes) -> bytes:
    if len(payload) > LARGEST:
        raise ValueError(f"a frame of {len(payload):,} bytes; at most {LARGEST:,} are written at once")
    return _FRAME.pack(MARK, len(payload), zlib.crc32(payload)) + payload


def _end(data: mmap.mmap, place: int) -> int | None:
    """Where the frame at place ends; None when none stands there whole."""
    if place + _FRAME.size > len(data):
        return None
    mark, length, checksum = _FRAME.unpack_from(data, place)
    end = place + _FRAME.size + int(length)
    if mark != MARK or end > len(data):
        return None
    with memoryview(data)[place + _FRAME.size : end] as payload:
        return end if zlib.crc32(payload) == checksum else None


def _write(file: int, data: bytes, place: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(file, left, place)
        left, place = left[written:], place + written

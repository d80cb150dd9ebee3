"""The file under a gallery: what was appended stays, what was torn goes, and nothing else is lost in silence."""

import errno
import logging
import os
from pathlib import Path

import pytest

from serve.gallery.log import HEAD, DamagedError, Log, create

PAYLOADS = [b"first", b"", b"\xf1\xa7\x00\xc3 a mark inside" * 3, b"last one"]


def written(path: Path) -> list[int]:
    """Writes PAYLOADS; returns where each frame begins."""
    create(path)
    log = Log(path)
    starts = []
    for _ in log.replay():
        raise AssertionError("a new log is empty")
    for payload in PAYLOADS:
        starts.append(log.size)
        log.append(payload)
    log.close()
    assert log.size == path.stat().st_size
    return starts


def read(path: Path) -> list[bytes]:
    log = Log(path)
    try:
        return [bytes(payload) for payload in log.replay()]
    finally:
        log.close()


def test_what_was_appended_is_read_again(tmp_path: Path) -> None:
    written(tmp_path / "items.log")
    assert read(tmp_path / "items.log") == PAYLOADS


def test_a_last_frame_torn_at_any_byte_is_dropped_and_the_others_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "items.log"
    last = written(path)[-1]
    whole = path.read_bytes()
    for length in range(last + 1, len(whole)):
        path.write_bytes(whole[:length])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert read(path) == PAYLOADS[:-1]
        assert f"the last {length - last} bytes were not written whole" in caplog.text
        assert path.stat().st_size == last
        log = Log(path)
        list(log.replay())
        log.append(b"after the crash")
        log.close()
        assert read(path) == [*PAYLOADS[:-1], b"after the crash"]


def test_a_last_frame_with_any_wrong_byte_is_dropped(tmp_path: Path) -> None:
    """The file has its new length, but not all blocks of it reached the disk."""
    path = tmp_path / "items.log"
    last = written(path)[-1]
    whole = path.read_bytes()
    for place in range(last, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert read(path) == PAYLOADS[:-1], place
    path.write_bytes(whole[:last] + bytes(len(whole) - last))
    assert read(path) == PAYLOADS[:-1]


def test_damage_before_intact_frames_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "items.log"
    start = written(path)[1]
    damaged = bytearray(path.read_bytes())
    damaged[start - 1] ^= 1  # the first payload
    path.write_bytes(damaged)
    with pytest.raises(DamagedError, match=f"damaged at byte {len(HEAD)}, with intact data after it"):
        read(path)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("content", [b"", b"short", b"another kind of file, long enough to have a head"])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "items.log").write_bytes(content)
    with pytest.raises(DamagedError, match="is no log"):
        read(tmp_path / "items.log")


def test_a_full_disk_leaves_no_half_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "items.log"
    written(path)
    log = Log(path)
    list(log.replay())
    real = os.pwrite

    def full(file: int, data: bytes, place: int) -> int:
        if place > log.size:
            raise OSError(errno.ENOSPC, "no space left")
        return real(file, bytes(data)[:7], place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="no space left"):
            log.append(b"does not fit")
    log.append(b"fits again")
    log.close()
    assert read(path) == [*PAYLOADS, b"fits again"]


def test_after_a_failed_fsync_nothing_more_is_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "items.log"
    written(path)
    log = Log(path)
    list(log.replay())

    def failing(_: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="input/output error"):
            log.append(b"who knows")
    with pytest.raises(OSError, match="restart the service"):
        log.append(b"refused")
    log.close()
    assert read(path)[: len(PAYLOADS)] == PAYLOADS


def test_the_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "items.log"
    written(path)
    log = Log(path)
    list(log.replay())

    def breaking() -> "list[bytes]":
        yield b"one"
        raise OSError(errno.ENOSPC, "no space left")

    with pytest.raises(OSError, match="no space left"):
        log.replace(breaking())
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    log.append(b"goes on")
    assert read(path) == [*PAYLOADS, b"goes on"]
    log.replace([b"a", b"b"])
    log.append(b"c")
    log.close()
    assert read(path) == [b"a", b"b", b"c"]
    assert [each.name for each in tmp_path.iterdir()] == ["items.log"]

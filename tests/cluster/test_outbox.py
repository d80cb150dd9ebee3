"""The outbox: in order, nothing lost, whatever the server, the process and the disk do meanwhile."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from cluster import outbox
from cluster.outbox import Outbox, OutboxInUse, Record, Sender


class Server:
    """Takes records, unless it is away."""

    def __init__(self) -> None:
        self.got: list[int] = []
        self.away = False
        self.tries = 0

    def __call__(self, records: list[Record]) -> None:
        self.tries += 1
        if self.away:
            raise ConnectionError("away")
        self.got += [record["n"] for record in records]


def until(true: object, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_records_arrive_in_order_and_the_folder_goes_with_the_last(tmp_path: Path) -> None:
    server = Server()
    with Outbox(tmp_path / "run") as box:
        for n in range(1203):
            box.append({"n": n})
        assert outbox.send(box, server) == 1203
        assert server.got == list(range(1203))
        assert outbox.send(box, server) == 0
    assert not (tmp_path / "run").exists()


def test_what_a_server_that_was_away_has_not_got_waits_in_the_folder(tmp_path: Path) -> None:
    server = Server()
    server.away = True
    with Outbox(tmp_path / "run") as box:
        box.append({"n": 0})
        with pytest.raises(ConnectionError):
            outbox.send(box, server)
    assert list(outbox.waiting(tmp_path)) == [tmp_path / "run"]
    server.away = False
    with Outbox(tmp_path / "run") as box:
        box.append({"n": 1})
        outbox.send(box, server)
    assert server.got == [0, 1]
    assert list(outbox.waiting(tmp_path)) == []


def test_a_crash_between_sending_and_marking_sends_again_and_loses_nothing(tmp_path: Path) -> None:
    server = Server()
    box = Outbox(tmp_path / "run")
    for n in range(outbox.CHUNK + 2):
        box.append({"n": n})
    records, mark = box.unsent(outbox.CHUNK)
    server(records)
    box.mark(mark)
    records, _ = box.unsent(outbox.CHUNK)
    server(records)
    box._locked.close()  # as the end of a process does
    with Outbox(tmp_path / "run") as again:
        outbox.send(again, server)
    last = [outbox.CHUNK, outbox.CHUNK + 1]
    assert server.got == [*range(outbox.CHUNK), *last, *last]


@pytest.mark.parametrize("torn", [b'{"n": 2', b"{", b'{"n": 2, "long": "' + b"x" * 200_000])
def test_a_line_that_a_dying_process_left_unfinished_is_dropped(tmp_path: Path, torn: bytes) -> None:
    folder = tmp_path / "run"
    box = Outbox(folder)
    box.append({"n": 0})
    box.append({"n": 1})
    box._locked.close()
    with (folder / "records.jsonl").open("ab") as file:
        file.write(torn)
    server = Server()
    with Outbox(folder) as again:
        again.append({"n": 2})
        outbox.send(again, server)
    assert server.got == [0, 1, 2]


def test_a_line_that_is_being_written_is_left_for_the_next_time(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "run")
    box.append({"n": 0})
    box._records.write(b'{"n": ')
    box._records.flush()
    records, mark = box.unsent(10)
    assert [record["n"] for record in records] == [0]
    box._records.write(b"1}\n")
    box._records.flush()
    box.mark(mark)
    assert box.unsent(10)[0] == [{"n": 1}]
    box.close()


def test_what_a_killed_process_recorded_is_there(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    written = fork.Event()

    def record() -> None:
        box = Outbox(tmp_path / "run")
        for n in range(100):
            box.append({"n": n})
        written.set()
        time.sleep(60)

    process = fork.Process(target=record)
    process.start()
    assert written.wait(30)
    with pytest.raises(OutboxInUse, match="in use"):
        Outbox(tmp_path / "run")
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    server = Server()
    with Outbox(tmp_path / "run") as box:
        outbox.send(box, server)
    assert server.got == list(range(100))


def test_one_who_waits_gets_the_folder_when_the_other_lets_go(tmp_path: Path) -> None:
    """The other removes it on leaving, and the lock of a removed folder protects nothing."""
    first = Outbox(tmp_path / "run")
    timer = threading.Timer(0.3, first.close)
    timer.start()
    with Outbox(tmp_path / "run", wait=30) as second:
        timer.join()
        second.append({"n": 1})
        assert [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").open()] == [{"n": 1}]
        with pytest.raises(OutboxInUse):
            Outbox(tmp_path / "run")


def test_recording_never_waits_for_the_server_and_it_gets_all_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "INTERVAL", 0.01)
    answers = threading.Event()
    server = Server()

    def slow(records: list[Record]) -> None:
        answers.wait(60)
        server(records)

    box = Outbox(tmp_path / "run")
    sender = Sender(box, slow)
    for n in range(50):
        box.append({"n": n})
        sender.wake()  # the first of them already hangs in the server
    assert server.got == []
    answers.set()
    until(lambda: len(server.got) == 50)
    server.away = True
    box.append({"n": 50})
    sender.wake()
    until(lambda: server.tries >= 2 and server.away)
    server.away = False
    sender.close(grace=30)
    box.close()
    assert server.got == list(range(51))
    assert not (tmp_path / "run").exists()


def test_a_sender_that_is_closed_while_the_server_is_away_leaves_the_rest(tmp_path: Path) -> None:
    server = Server()
    server.away = True
    box = Outbox(tmp_path / "run")
    sender = Sender(box, server)
    box.append({"n": 0})
    sender.wake()
    until(lambda: server.tries > 0)
    sender.close(grace=30)
    box.close()
    assert server.tries == 2, "once more at the end"
    assert list(outbox.waiting(tmp_path)) == [tmp_path / "run"]


def test_outboxes_of_other_runs_may_go_while_one_looks(tmp_path: Path) -> None:
    for name in ("first", "second", "third"):
        with Outbox(tmp_path / name) as box:
            box.append({"n": 0})
    found = outbox.waiting(tmp_path)
    assert next(found) == tmp_path / "first"
    shutil.rmtree(tmp_path / "second")
    assert list(found) == [tmp_path / "third"]
    assert not outbox.holds(tmp_path / "second")

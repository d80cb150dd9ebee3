"""Servers that tests start on loopback, and ports for them."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def free_port() -> int:
    """A port that nobody listens at now."""
    return free_ports(1)[0]


class Postgres:
    """PostgreSQL of Debian's package with a new and empty data directory, running.

    Args:
        user: its superuser.
        password: of that user.
        rights: options of initdb that say how users show who they are.
        settings: options of the server.
        port: at 127.0.0.1.
    """

    def __init__(
        self, user: str, password: str, rights: Sequence[str], settings: Sequence[str] = (), *, port: int
    ) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        initdb = shutil.which("initdb") or (str(found[-1]) if found else None)
        if initdb is None:
            pytest.skip("needs PostgreSQL: apt-get install postgresql")
        self.programs = Path(initdb).resolve().parent
        self._folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # pytest's own folders are closed to another user
        self._as_user: dict[str, Any] = {}
        (self._folder / "password").write_text(password)
        if os.geteuid() == 0:  # it refuses to run as root; Debian's package brings a user for it
            self._as_user = {"user": "postgres", "group": "postgres", "extra_groups": ()}
            shutil.chown(self._folder, "postgres")
            shutil.chown(self._folder / "password", "postgres")
        self._run("initdb", "-U", user, f"--pwfile={self._folder / 'password'}", "--no-sync", *rights)
        here = f"-p {port} -k {self._folder} -c listen_addresses=127.0.0.1 -F"
        self._run("pg_ctl", "start", "-w", "-o", " ".join([*settings, here]))

    def stop(self) -> None:
        self._run("pg_ctl", "stop", "-m", "immediate")
        shutil.rmtree(self._folder)

    def _run(self, program: str, *words: str) -> None:
        # Into a file: the server inherits it, and would hold a pipe open.
        with (self._folder / "output").open("a") as output:
            subprocess.run(
                [str(self.programs / program), "-D", str(self._folder / "data"), *words],
                cwd=self._folder,
                check=True,
                timeout=120,
                stdout=output,
                stderr=output,
                **self._as_user,
            )

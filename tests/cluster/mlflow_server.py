"""A real MLflow server on loopback that can be killed and started again on the same port and database."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest


class MLflowServer:
    """Not started yet; its artifacts lie behind it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        address = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        store = ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        store += ["--artifacts-destination", str(self.folder / "server-artifacts")]
        log = self.folder / "server.log"
        # An environment of its own: exec would read that of this process while threads of libraries may change it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *address, *store],
            stdout=log.open("a"),
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            env=dict(os.environ),
            start_new_session=True,
        )
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=1)
                return
            except OSError:
                assert self._process.poll() is None, log.read_text()
                time.sleep(0.5)
        self.kill()
        pytest.fail(f"no answer in two minutes: {log.read_text()}")

    def kill(self) -> None:
        """Ends it and its workers at once."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

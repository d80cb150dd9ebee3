"""Starts on this machine what the manifests start in pods: their commands and variables, with other addresses."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.k8s.manifests import ROOT
from tests.servers import Postgres, free_ports


class Here:
    """A folder for everything, the Secrets' values, and what of the manifests is another here.

    Args:
        folder: new and empty.
        secrets: values by Secret and key.
        replaced: texts of the manifests, and what stands for them here.
    """

    def __init__(self, folder: Path, secrets: Mapping[str, Mapping[str, str]], replaced: Mapping[str, str]) -> None:
        self.folder, self.secrets, self.replaced = folder, secrets, replaced
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._short: list[str] = []

    def text(self, value: str) -> str:
        for there, here in self.replaced.items():
            value = value.replace(there, here)
        return value

    def environment(self, container: Mapping[str, Any]) -> dict[str, str]:
        """The variables of a container, with this machine's PATH and nothing else of this process."""
        found = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.folder),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        for variable in container.get("env", ()):
            if "value" in variable:
                found[variable["name"]] = self.text(variable["value"])
            else:
                of = variable["valueFrom"]["secretKeyRef"]
                found[variable["name"]] = self.secrets[of["name"]][of["key"]]
        return found

    def start(self, name: str, words: Sequence[str], environment: Mapping[str, str], **options: Any) -> None:
        """Starts a program that stays; its log is NAME.log."""
        log = (self.folder / f"{name}.log").open("wb")
        options = {"cwd": self.folder, "stdout": log, "stderr": subprocess.STDOUT, **options}
        self._running[name] = subprocess.Popen(list(words), env=dict(environment), **options)

    def run(self, words: Sequence[str], environment: Mapping[str, str], **options: Any) -> str:
        """Runs a program to its end; what it said."""
        options = {"cwd": self.folder, "timeout": 300, **options}
        done = subprocess.run(
            list(words), env=dict(environment), capture_output=True, text=True, check=False, **options
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def wait(self, name: str, until: Callable[[], bool], seconds: float = 240) -> None:
        """Returns when something is so, of a program that was started."""
        deadline = time.monotonic() + seconds
        while not until():
            log = (self.folder / f"{name}.log").read_text(errors="replace")
            assert self._running[name].poll() is None, log[-6000:]
            assert time.monotonic() < deadline, log[-6000:]
            time.sleep(1)

    def stop(self) -> None:
        for process in self._running.values():
            if process.poll() is None:
                # Ray's processes are its children's children.
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
                process.wait()
        self._running.clear()
        for folder in self._short:
            shutil.rmtree(folder, ignore_errors=True)

    def short_folder(self) -> str:
        """A folder whose path is short, for sockets; gone with the rest."""
        self._short.append(tempfile.mkdtemp(prefix="rk-"))
        return self._short[-1]


class Database:
    """PostgreSQL as its image starts and fills it: by the container's variables and the init script."""

    def __init__(self, here: Here, container: Mapping[str, Any], init: str, port: int) -> None:
        self._here = here
        self.environment = here.environment(container) | {"PGHOST": "127.0.0.1", "PGPORT": str(port)}
        rights = self.environment["POSTGRES_INITDB_ARGS"].split()
        known = self.environment["POSTGRES_USER"], self.environment["POSTGRES_PASSWORD"]
        self._server = Postgres(*known, rights, container["args"], port=port)
        self.environment["PATH"] = f"{self._server.programs}{os.pathsep}{self.environment['PATH']}"
        here.run(["bash", "-e", "-c", init], self.environment)
        here.run(container["readinessProbe"]["exec"]["command"], self.environment)

    def query(self, database: str, user: str, password: str, text: str) -> str:
        words = ["psql", "-At", "-U", user, "-d", database, "-c", text]
        return self._here.run(words, {**self.environment, "PGPASSWORD": password}).strip()

    def stop(self) -> None:
        self._server.stop()


class Head:
    """A Ray head as the operator starts one: the container's variables, the parameters, token authentication."""

    def __init__(self, here: Here, name: str, cluster: Mapping[str, Any], *, cpus: int, redis: str = "") -> None:
        self.name, self._here = name, here
        container = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
        port, self.dashboard, self.agent, *others = free_ports(7)
        token = here.secrets[cluster["authOptions"]["secretName"]]["auth_token"]
        self.environment = here.environment(container)
        self.environment |= {"RAY_AUTH_MODE": cluster["authOptions"]["mode"], "RAY_AUTH_TOKEN": token}
        if redis:  # of gcsFaultToleranceOptions
            of = cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
            self.environment |= {"RAY_REDIS_ADDRESS": redis, "REDIS_PASSWORD": here.secrets[of["name"]][of["key"]]}
            self.environment |= {"RAY_external_storage_namespace": name}
        given = {**cluster["headGroupSpec"]["rayStartParams"], "num-cpus": str(cpus), "dashboard-host": "127.0.0.1"}
        given |= {"port": str(port), "dashboard-port": str(self.dashboard), "temp-dir": here.short_folder()}
        agents = ("dashboard-agent-grpc", "runtime-env-agent", "metrics-export", "ray-client-server")
        given |= {f"{agent}-port": str(each) for agent, each in zip(agents, others, strict=True)}
        given |= {"dashboard-agent-listen-port": str(self.agent)}
        if redis:  # as the operator does
            given["redis-password"] = self.environment["REDIS_PASSWORD"]
        words = [word for key, value in given.items() for word in (f"--{key}", value)]
        here.start(
            name, ["ray", "start", "--head", "--block", "--node-ip-address", "127.0.0.1", *words], self.environment
        )
        probe = container["readinessProbe"]["httpGet"]
        assert probe["port"] == 52365
        here.wait(name, lambda: status(f"http://127.0.0.1:{self.agent}{probe['path']}") == 200)
        here.wait(name, lambda: status(f"{self.address}/api/version") in (200, 401))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def log(self, job: str) -> str:
        """What a job has said so far."""
        known = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(f"{self.address}/api/jobs/{job}/logs", headers=known)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return str(json.load(answer)["logs"])

    def ray(self, *words: str) -> str:
        """`ray ...` from a laptop: with the token and nothing of the pod."""
        own = {name: value for name, value in self.environment.items() if name.startswith("RAY_AUTH")}
        return self._here.run(words, {**self._here.environment({}), **own})


def listens(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


def status(url: str, headers: Mapping[str, str] | None = None, body: bytes | None = None) -> int:
    """The HTTP status; 0 when nobody answers."""
    try:
        request = urllib.request.Request(url, body, dict(headers or {}))
        return int(urllib.request.urlopen(request, timeout=20).status)
    except urllib.error.HTTPError as refused:
        return refused.code
    except OSError:
        return 0


def reachable(host: str) -> bool:
    """Whether a web server answers on the internet."""
    try:
        with socket.create_connection((host, 443), timeout=5):
            return True
    except OSError:
        return False

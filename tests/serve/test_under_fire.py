"""The service as a command, with the gate in Ray Serve's proxy: overloaded, losing a replica, losing MLflow."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from mlflow import MlflowClient
from PIL import Image

from cluster import registry
from serve import keys
from tests.cluster.mlflow_server import MLflowServer
from tests.serve.pictures import data_uri, noise, offline, write_checkpoint
from tests.serve.test_service import wait_for
from tests.servers import free_port

pytestmark = pytest.mark.slow
IMAGE = noise(0)


@dataclass
class Running:
    """A service in a process of its own."""

    url: str
    process: psutil.Process

    def replicas(self) -> list[psutil.Process]:
        return self._named("ray::ServeReplica:onethreshold:Embeddings")

    def memory(self) -> int:
        """Bytes of the proxy and the replicas."""
        return sum(process.memory_info().rss for process in [*self._named("ray::ProxyActor"), *self.replicas()])

    def ready(self) -> dict[str, Any]:
        try:
            return dict(httpx.get(f"{self.url}/readyz", timeout=30).json())
        except httpx.TransportError:
            return {}

    def _named(self, name: str) -> list[psutil.Process]:
        children = self.process.children(recursive=True)
        return [child for child in children if " ".join(child.cmdline()).startswith(name)]


@contextmanager
def running(folder: Path, *words: str, **environment: str) -> Iterator[Running]:
    """Starts `python -m serve.app`, waits until a model is loaded, and ends it as Ctrl-C does."""
    port = free_port()
    command = [sys.executable, "-m", "serve.app", "--port", str(port), *words]
    inherited = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    with (
        (folder / "service.log").open("a") as log,
        subprocess.Popen(
            command, cwd=folder, env={**inherited, **environment}, stdout=log, stderr=subprocess.STDOUT
        ) as process,
    ):
        service = Running(f"http://127.0.0.1:{port}", psutil.Process(process.pid))
        try:
            wait_for(lambda: service.ready().get("status") == "ready" or process.poll() is not None, seconds=120)
            assert process.poll() is None, (folder / "service.log").read_text()
            yield service
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def large_picture() -> bytes:
    """Costs much to decode, and little to send."""
    stream = io.BytesIO()
    Image.new("RGB", (2500, 2500), "red").save(stream, "PNG")
    return stream.getvalue()


def test_ten_times_too_much_is_refused_and_then_all_is_well(tmp_path: Path) -> None:
    seconds, connections = 60, 100
    key, line = keys.new("crowd")
    (tmp_path / "keys").write_text(line)
    folder = write_checkpoint(tmp_path / "mine", seed=0)
    headers = {"Authorization": f"Bearer {key}", "Accept": "application/x-npy"}
    files = [("input", large_picture())] * 8
    answers: list[httpx.Response] = []

    async def ask(client: httpx.AsyncClient, until: float) -> None:
        while time.monotonic() < until:
            answers.append(await client.post("/v1/embeddings", files=files, headers=headers))
            if answers[-1].status_code != 200:
                await asyncio.sleep(0.5)

    async def crowd(service: Running) -> int:
        until = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=connections)
        async with httpx.AsyncClient(base_url=service.url, timeout=90, limits=limits) as client:
            asking = [asyncio.create_task(ask(client, until)) for _ in range(connections)]
            most = 0
            while time.monotonic() < until:
                await asyncio.sleep(0.5)
                most = max(most, service.memory())
            await asyncio.gather(*asking)
        return most

    with running(tmp_path, "--model", str(folder), "--keys", str(tmp_path / "keys")) as service:
        assert httpx.post(f"{service.url}/v1/embeddings", files=files).status_code == 401
        assert httpx.get(f"{service.url}/v1/models").status_code == 401
        assert httpx.get(f"{service.url}/healthz").status_code == 200
        alone = httpx.post(f"{service.url}/v1/embeddings", files=files, headers=headers, timeout=60)
        assert alone.status_code == 200
        before = service.memory()
        most = asyncio.run(crowd(service))
        recovered = time.monotonic() + 5
        statuses = Counter(answer.status_code for answer in answers)
        while (last := httpx.post(f"{service.url}/v1/embeddings", files=files, headers=headers, timeout=60)).is_error:
            assert time.monotonic() < recovered, last.text
            time.sleep(0.2)
    assert set(statuses) <= {200, 429, 503}, statuses
    assert statuses[200] > 10, statuses
    assert statuses[429] + statuses[503] > 9 * statuses[200], "it was ten times too much"
    for answer in answers:
        if answer.status_code != 200:
            assert set(answer.json()) == {"error"}
            assert int(answer.headers["Retry-After"]) > 0
    assert most - before < 2**29, f"{(most - before) / 2**20:.0f} MiB more"


def test_a_replica_killed_under_load_costs_what_it_had_in_hand(tmp_path: Path) -> None:
    connections = 8
    folder = write_checkpoint(tmp_path / "mine", seed=0)
    expected = offline(folder, [IMAGE])
    failed: list[httpx.Response] = []
    answered = 0

    async def ask(client: httpx.AsyncClient, done: asyncio.Event) -> None:
        nonlocal answered
        while not done.is_set():
            answer = await client.post("/v1/embeddings", json={"input": data_uri(IMAGE)})
            if answer.status_code == 200:
                np.testing.assert_allclose([answer.json()["data"][0]["embedding"]], expected, atol=1e-5)
                answered += 1
            else:
                failed.append(answer)
                await asyncio.sleep(float(answer.headers["Retry-After"]))

    async def load(service: Running) -> None:
        done = asyncio.Event()
        async with httpx.AsyncClient(base_url=service.url, timeout=90) as client:
            asking = [asyncio.create_task(ask(client, done)) for _ in range(connections)]
            await asyncio.sleep(3)
            service.replicas()[0].kill()
            await asyncio.sleep(8)
            done.set()
            await asyncio.gather(*asking)

    with running(tmp_path, "--model", str(folder), "--replicas", "2") as service:
        wait_for(lambda: len(service.replicas()) == 2)
        asyncio.run(load(service))
        wait_for(lambda: len(service.replicas()) == 2)
        assert service.ready()["status"] == "ready"
    assert len(failed) <= connections, [answer.text for answer in failed]
    assert {answer.json()["error"]["code"] for answer in failed} <= {"replica_lost"}
    assert answered > 50


def test_mlflow_down_changes_nothing_and_a_restart_serves_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    server = MLflowServer(tmp_path)
    server.start()
    before = mlflow.get_tracking_uri()
    environment = {"MLFLOW_TRACKING_URI": server.url, "ONETHRESHOLD_CACHE": str(tmp_path / "cache")}
    words = ["--model", "models:/onethreshold@champion", "--poll", "0.5"]
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        mlflow.set_tracking_uri(server.url)
        run = MlflowClient(server.url).create_run(
            "0"
        )  # not in the experiment that other tests have made the present one
        folder = write_checkpoint(tmp_path / "mine", seed=0)
        version = registry.register(folder, run_id=run.info.run_id, operating_points=[], metrics={})
        registry.promote(version)
        with running(tmp_path, *words, **environment) as service:
            assert service.ready()["note"] is None
            server.kill()
            wait_for(lambda: "cannot be reached" in str(service.ready()["note"]))
            assert embedded(service, version.label) == pytest.approx(offline(folder, [IMAGE])[0], abs=1e-5)
        with running(tmp_path, *words, **environment) as service:
            assert "cache" in service.ready()["note"]
            assert embedded(service, version.label) == pytest.approx(offline(folder, [IMAGE])[0], abs=1e-5)
    finally:
        server.kill()
        mlflow.set_tracking_uri(before)


def embedded(service: Running, model: str) -> list[float]:
    answer = httpx.post(f"{service.url}/v1/embeddings", json={"input": data_uri(IMAGE)}, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return list(answer.json()["data"][0]["embedding"])

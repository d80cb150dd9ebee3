"""The whole service: Ray Serve on a real port, a real registry, real encoders, real clients."""

import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest

from cluster import registry
from dml.metrics.drift import ENOUGH
from serve import app
from serve.calibrations import Calibrations
from serve.client import Client, InvalidRequestError
from serve.limits import Limits
from tests.serve.calibrated import calibration
from tests.serve.pictures import data_uri, noise, offline, write_checkpoint
from tests.servers import free_port

NAME = "served"
FILES = [noise(seed) for seed in range(5)]
IMAGES = [data_uri(data) for data in FILES]


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.1)


@dataclass(frozen=True)
class Service:
    """A running service that follows models:/served@champion, and two checkpoints to promote."""

    url: str
    folders: tuple[Path, Path]
    run_id: str

    def promote(self, which: int) -> registry.ModelVersion:
        version = registry.register(self.folders[which], run_id=self.run_id, operating_points=[], metrics={}, name=NAME)
        registry.promote(version)
        wait_for(lambda: self.ready().get("model") == version.label)
        return version

    def ready(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/readyz", timeout=30).json())

    def embed(self, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/embeddings", json=body, timeout=60)


@pytest.fixture(scope="module")
def service(mlflow_store: str, ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    import mlflow
    import ray.serve

    folder = tmp_path_factory.mktemp("serve")
    checkpoints = write_checkpoint(folder / "one", seed=1), write_checkpoint(folder / "two", seed=2)
    with mlflow.start_run() as run:
        run_id = run.info.run_id
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONETHRESHOLD_CACHE", str(folder / "cache"))
        options = app.Options(
            port=free_port(), model=f"models:/{NAME}@champion", poll=0.2, limits=Limits(request_bytes=200_000)
        )
        url = app.start(options)
        yield Service(url, checkpoints, run_id)
        ray.serve.shutdown()


@pytest.fixture(scope="module")
def champion(service: Service) -> Service:
    """The service with a model loaded, whichever test asks first."""
    if service.ready().get("status") != "ready":
        service.promote(0)
    return service


def test_it_starts_without_a_champion_and_follows_the_alias_without_a_restart(service: Service) -> None:
    assert httpx.get(f"{service.url}/healthz").json() == {"status": "ok"}
    for answer in (httpx.get(f"{service.url}/readyz"), service.embed(input=IMAGES[0])):
        assert answer.status_code == 503
        assert answer.json()["error"]["message"].startswith("no champion yet")
        assert "Retry-After" in answer.headers
    for which in (0, 1):
        version = service.promote(which)
        assert service.ready() == {
            "status": "ready",
            "model": version.label,
            "name": NAME,
            "version": str(version.version),
            "dim": 16,
            "image_size": 32,
            "note": None,
        }
        answer = service.embed(model=NAME, input=IMAGES).json()
        assert answer["model"] == version.label
        got = np.array([item["embedding"] for item in answer["data"]])
        np.testing.assert_allclose(got, offline(service.folders[which], FILES), atol=1e-5)


def test_files_in_a_form_are_answered_as_an_array(champion: Service) -> None:
    answer = httpx.post(
        f"{champion.url}/v1/embeddings",
        files=[("input", data) for data in FILES],
        headers={"Accept": "application/x-npy"},
        timeout=60,
    )
    assert answer.headers["x-onethreshold-model"] == champion.ready()["model"]
    got = np.load(io.BytesIO(answer.content), allow_pickle=False)
    json = np.array([item["embedding"] for item in champion.embed(input=IMAGES).json()["data"]])
    np.testing.assert_allclose(got, json, atol=1e-6)


def test_models_tell_the_alias(champion: Service) -> None:
    [card] = httpx.get(f"{champion.url}/v1/models").json()["data"]
    assert (f"{card['id']}@{card['version']}", card["alias"]) == (champion.ready()["model"], "champion")


def test_prometheus_finds_the_metrics_where_ray_shows_its_own(champion: Service) -> None:
    import ray

    [node] = ray.nodes()
    url = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    champion.embed(input=IMAGES)
    champion.embed(input=[IMAGES[0]] * 1000)  # refused before any route
    version = champion.ready()["model"]
    wanted = [
        r'onethreshold_requests\w*{.*route="/v1/embeddings".*status="200"',
        r"onethreshold_images\w*{",
        r"onethreshold_request_ms_bucket{",
        r"onethreshold_batch_images_bucket{",
        r'onethreshold_rejections\w*{.*code="request_too_large"',
        rf'onethreshold_model{{.*model="{version}".*}} 1',
    ]
    wait_for(lambda: all(re.search(pattern, httpx.get(url).text) for pattern in wanted))


def test_a_calibration_is_taken_up_live_and_decides(champion: Service) -> None:
    """Verification, drift with its metrics, and the page, in a replica of Ray Serve and through its proxy."""
    version = registry.champion(NAME)
    assert version is not None
    calibrations, mine = Calibrations.of_version(version), calibration(source="pairs.csv", created=1_800_000_000)

    def used() -> str | None:
        answer = httpx.get(f"{champion.url}/v1/calibration", timeout=30).json()
        return answer.get("id") or answer["error"]["code"]

    with Client(champion.url) as client:
        one, other = client.embeddings(FILES[:2])
        with pytest.raises(InvalidRequestError, match="has no operating points: give a threshold"):
            client.verify(FILES[0], FILES[1])
        calibrations.use(mine)
        wait_for(lambda: used() == mine.id)
        found = client.verify(FILES[0], FILES[1], far=0.001)
        assert (found.calibration, found.threshold, found.model) == (mine.id, mine.at(0.001).threshold, version.label)
        assert found.distance == pytest.approx(float(np.linalg.norm(one - other)), abs=1e-5)
        files = {"a": FILES[0], "b": FILES[1]}
        form = httpx.post(f"{champion.url}/v1/verify", files=files, data={"far": "0.001"}, timeout=60).json()
        assert (form["match"], form["distance"]) == (found.match, pytest.approx(found.distance, abs=1e-6))
        for _ in range(ENOUGH):
            client.verify(one, -one, threshold=1)
        assert httpx.get(f"{champion.url}/v1/drift").json()["level"] == "drifted"
    with pytest.raises(ValueError, match="registered without operating points"):
        calibrations.revert("registered")
    page = httpx.get(champion.url)
    assert (page.status_code, "Same or not?" in page.text) == (200, True)
    assert httpx.get(f"{champion.url}/page/page.js").headers["content-type"].startswith("text/javascript")


@pytest.mark.slow
def test_a_change_over_under_load_fails_no_request(champion: Service) -> None:
    """Four clients ask all the time while the alias moves there and back."""
    done = threading.Event()
    seen: list[tuple[int, str]] = []

    def ask() -> None:
        with httpx.Client(timeout=60) as client:
            while not done.is_set():
                answer = client.post(f"{champion.url}/v1/embeddings", json={"input": IMAGES})
                seen.append((answer.status_code, answer.headers.get("x-onethreshold-model", answer.text)))

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        labels = [champion.promote(which).label for which in (1, 0)]
    finally:
        done.set()
        for client in clients:
            client.join()
    assert {status for status, _ in seen} == {200}, [one for one in seen if one[0] != 200][:3]
    assert set(labels) <= {model for _, model in seen}
    assert len(seen) > 20


def test_a_serve_config_file_deploys_the_same(champion: Service) -> None:
    """What `serve deploy` does with import_path: serve.app:build and args."""
    import ray.serve

    args = {"model": str(champion.folders[0]), "cpus": 0.5, "batch": 4, "limits": {"images": 2}, "replicas": "1:2"}
    ray.serve.run(app.build(args), name="built", route_prefix="/built")
    try:
        url = f"{champion.url}/built"
        wait_for(lambda: httpx.get(f"{url}/readyz").status_code == 200)
        answer = httpx.post(f"{url}/v1/embeddings", json={"input": IMAGES[:2]}, timeout=60).json()
        assert answer["model"] == "onethreshold@one"
        got = [item["embedding"] for item in answer["data"]]
        np.testing.assert_allclose(got, offline(champion.folders[0], FILES[:2]), atol=1e-5)
        assert httpx.post(f"{url}/v1/embeddings", json={"input": IMAGES}).status_code == 413
    finally:
        ray.serve.delete("built")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"modle": "x"}, "unknown option 'modle'; valid: model"),
        ({"model": "models:/onethreshold"}, "models:/NAME@ALIAS"),
        ({"replicas": "4:1"}, "replicas: '4:1' is neither a number from 1"),
        ({"replicas": "0"}, "replicas: '0'"),
        ({"limits": {"images": 0}}, r"limits.images: .* \(got 0\)"),
        ({"limits": {"imags": 1}}, r"limits.imags"),
        ({"batch": 0}, "batch: 0 must be above 0"),
        ({"gpus": -1}, "gpus: -1"),
        ({"keys": "/no/such/file"}, "keys: /no/such/file cannot be read"),
    ],
)
def test_a_serve_config_file_is_checked_as_the_command_line(args: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        app.build(args)


def test_the_openai_client_works_against_it(champion: Service) -> None:
    client = openai.OpenAI(base_url=f"{champion.url}/v1", api_key="none", max_retries=0)
    [card] = client.models.list().data
    packed = client.embeddings.create(model=card.id, input=IMAGES)  # asks for base64 on its own
    floats = client.embeddings.create(model=card.id, input=IMAGES, encoding_format="float", dimensions=16)
    got = np.array([item.embedding for item in packed.data])
    np.testing.assert_allclose(got, [item.embedding for item in floats.data], atol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
    assert packed.model == champion.ready()["model"]
    with pytest.raises(openai.NotFoundError, match="unknown model 'gpt'"):
        client.embeddings.create(model="gpt", input=IMAGES)
    with pytest.raises(openai.BadRequestError, match="embeds images, not text"):
        client.embeddings.create(model=card.id, input="two words")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"input": "http://127.0.0.1/a.png"}, 400, "url_not_fetched"),
        ({"input": [*IMAGES, data_uri(b"text")]}, 422, "unreadable_image"),
        ({"input": IMAGES[0], "surprise": 1}, 422, "invalid_request"),
        ({"input": [IMAGES[0]] * 65}, 413, "too_many_images"),
        ({"input": [IMAGES[0]] * 1000}, 413, "request_too_large"),
    ],
)
def test_bad_input_is_refused_through_ray_serve_too(champion: Service, body: Any, status: int, code: str) -> None:
    answer = champion.embed(**body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_body_of_unknown_length_is_refused_while_it_is_sent(champion: Service) -> None:
    chunks = (b'{"input": "' + b"A" * 50_000 for _ in range(40))
    answer = httpx.post(
        f"{champion.url}/v1/embeddings", content=chunks, headers={"Content-Type": "application/json"}, timeout=60
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert champion.embed(input=IMAGES[0]).status_code == 200


def test_requests_at_the_same_time_get_their_own_answers(champion: Service) -> None:
    import concurrent.futures

    def one(index: int) -> Any:
        [item] = champion.embed(input=IMAGES[index], encoding_format="base64").json()["data"]
        return np.frombuffer(base64.b64decode(item["embedding"]), "<f4")

    alone = [one(index) for index in range(len(IMAGES))]
    order = list(range(len(IMAGES))) * 4
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for index, got in zip(order, pool.map(one, order), strict=True):
            np.testing.assert_allclose(got, alone[index], atol=1e-6)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"cpus": 64}, r"cpus: 64 is more than the cluster has \(2 CPU\)"),
        ({"gallery_gpus": 1, "galleries": "shops"}, r"gallery_gpus: 1 is more than the cluster has \(0 GPU\)"),
        ({"replicas": "3:5"}, "replicas: 3 with 1 CPU each need 3 CPU; this machine has 2"),
        ({"replicas": "2", "cpus": 1.5}, "replicas: 2 with 1.5 CPU each need 3 CPU; this machine has 2"),
    ],
)
def test_replicas_that_the_cluster_cannot_hold_are_refused(
    wanted: dict[str, Any], says: str, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match=says):
        app.start(app.Options(**wanted))


def test_the_address_of_an_ipv6_host_is_one_that_clients_take() -> None:
    url = app.Options(host="::1", port=8123).url
    assert (httpx.URL(url).host, httpx.URL(url).port) == ("::1", 8123)


@pytest.mark.slow
def test_the_command_serves_a_folder_and_leaves_no_process_behind(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "mine", seed=0)
    port = free_port()
    command = [sys.executable, "-m", "serve.app", "--model", str(folder), "--port", str(port)]
    environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        said = ""
        while "Ctrl-C" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        wait_for(lambda: httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200)
        (tmp_path / "image.png").write_bytes(FILES[0])
        [curl] = re.findall(r"curl \S+/v1/embeddings .*", said)
        answer = subprocess.run(
            ["bash", "-c", curl], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert '"model":"onethreshold@mine"' in answer.stdout
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0, rest
    assert rest == "stopping\n"
    assert started
    assert psutil.wait_procs(started, timeout=20)[1] == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "/no/such/folder"], "/no/such/folder is no checkpoint"),
        (["--model", "models:/onethreshold"], "models:/NAME@ALIAS"),
        (["--poll", "0"], "poll: 0 must be above 0"),
        (["--limits.images", "0"], "images"),
        (["--limits.imags", "1"], "unknown option '--limits.imags'; valid: --limits.images"),
        (["--port", "{taken}"], "cannot listen on http://127.0.0.1:{taken}: "),
        (["--port", "70000"], "port: 70000 is no port; valid: 1 to 65535"),
        (["--port", "-1"], "port: -1 is no port"),
        (["--port", "{free}", "--galleries", "{file}"], "galleries: {file}: File exists"),
        (["--port", "{free}", "--galleries", "{file}/inside"], "Not a directory"),
    ],
)
def test_what_cannot_start_is_one_line_and_exit_2(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "file").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        known = {"taken": taken.getsockname()[1], "free": free_port(), "file": tmp_path / "file"}
        with pytest.raises(SystemExit) as stopped:
            app.main([word.format(**known) for word in arguments])
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert says.format(**known) in shown.err
    assert len(shown.err.splitlines()) == 1

"""What the manifests start, started here: PostgreSQL, Redis, MLflow, two Ray clusters, the first search, the endpoint.

By the commands and variables of the manifests, with credentials that the test makes. Other than there are addresses,
ports and folders, the size of the search and of a replica (no GPU), and that each Ray cluster is its head alone.
"""

import base64
import io
import json
import shlex
import shutil
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from cluster import bootstrap
from tests.k8s.here import Database, Head, Here, listens, status
from tests.k8s.manifests import Manifests
from tests.servers import free_port, free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SMALL = {"--gpus-per-worker": "0", "--trials-at-once": "1", "--wait-for-resources": "60"}
"""Options of the first search that are others here; beside them it searches the smallest dataset."""
TINY = ["--recipe", "digits", "--trials", "2", "--train.epochs", "1"]


@dataclass
class Service:
    """Everything but the Ray clusters, running."""

    manifests: Manifests
    here: Here
    postgres: Database
    mlflow: str
    redis: str

    def secret(self, name: str, key: str) -> str:
        return self.here.secrets[name][key]

    def cluster(self, name: str) -> dict[str, Any]:
        return dict(self.manifests.clusters())[name]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    if shutil.which("redis-server") is None:
        pytest.skip("needs Redis: apt-get install redis-server")
    folder = tmp_path_factory.mktemp("pods")
    manifests = Manifests.read()
    sql, http, memory = free_ports(3)
    replaced = {
        "postgres:5432": f"127.0.0.1:{sql}",
        "mlflow:5000": f"127.0.0.1:{http}",
        **{path: f"{folder}{path}" for path in ("/artifacts", "/etc/mlflow", "/shared", "/serving")},
    }
    here = Here(folder, {name: bootstrap.values(name) for name in bootstrap.SECRETS}, replaced)
    init = manifests.get("ConfigMap", "postgres")["data"]["init.sh"]
    postgres = Database(here, main(manifests, "StatefulSet", "postgres"), init, sql)
    try:
        start_redis(here, main(manifests, "StatefulSet", "redis"), memory)
        start_mlflow(here, manifests, http)
        yield Service(manifests, here, postgres, f"http://127.0.0.1:{http}", f"127.0.0.1:{memory}")
    finally:
        here.stop()
        postgres.stop()


def main(manifests: Manifests, kind: str, name: str) -> dict[str, Any]:
    return manifests.get(kind, name)["spec"]["template"]["spec"]["containers"][0]


def start_redis(here: Here, container: dict[str, Any], port: int) -> None:
    environment = here.environment(container)
    (here.folder / "data").mkdir()
    text = container["args"][0].replace("dir /data", f"dir {here.folder}/data\nbind 127.0.0.1\nport {port}")
    here.start("redis", [*container["command"], text], environment)
    here.wait("redis", lambda: listens(port))
    asked = ["redis-cli", "-p", str(port), "ping"]
    assert "PONG" in here.run(asked, environment)
    assert "NOAUTH" in here.run(asked, here.environment({})), "without the password"


def start_mlflow(here: Here, manifests: Manifests, port: int) -> None:
    container = main(manifests, "Deployment", "mlflow")
    (here.folder / "etc/mlflow").mkdir(parents=True)
    for file, text in manifests.get("ConfigMap", "mlflow")["data"].items():
        (here.folder / "etc/mlflow" / file).write_text(here.text(text))
    words = [*container["command"], *container["args"]]
    words[words.index("--port") + 1] = str(port)
    words[words.index("--host") + 1] = "127.0.0.1"
    here.start("mlflow", words, here.environment(container))
    probe = container["readinessProbe"]["httpGet"]["path"]
    here.wait("mlflow", lambda: status(f"http://127.0.0.1:{port}{probe}") == 200)
    users = manifests.get("Job", "bootstrap")["spec"]["template"]["spec"]["containers"][0]
    for said in ("made: trainer, reader", "made: none, all were there"):
        assert said in here.run(users["command"], here.environment(users))


def test_mlflow_asks_who_it_is_and_by_what_name(service: Service) -> None:
    search = f"{service.mlflow}/api/2.0/mlflow/experiments/search"
    body = {"Content-Type": "application/json"}, b'{"max_results": 1}'
    assert status(search, *body) == 401
    for user in ("admin", "trainer", "reader"):
        known = basic(user, service.secret("mlflow", f"{user}-password"))
        assert status(search, {**known, **body[0]}, body[1]) == 200
    assert status(search, {**known, **body[0], "Host": "evil.example:5000"}, body[1]) == 403
    create = f"{service.mlflow}/api/2.0/mlflow/users/create"
    user = b'{"username": "guest", "password": "correct horse battery"}'
    assert status(create, {**known, **body[0]}, user) == 403, "the reader is no administrator"


def test_each_user_has_the_own_database_alone(service: Service) -> None:
    mine = service.secret("postgres", "optuna-password")
    assert service.postgres.query("optuna", "optuna", mine, "SELECT 1") == "1"
    with pytest.raises(AssertionError, match="permission denied for database"):
        service.postgres.query("mlflow", "optuna", mine, "SELECT 1")


def test_from_nothing_to_an_answer(service: Service) -> None:
    """The endpoint is up before there is a champion; the search makes one; the endpoint serves it, unchanged."""
    here = service.here
    endpoint, url = start_endpoint(service)
    assert status(f"{url}/readyz") == 503
    assert status(f"{url}/v1/embeddings", {"Content-Type": "application/json"}, b"{}") == 401

    search = Head(here, "search", service.cluster("RayJob/search"), cpus=1)
    assert status(f"{search.address}/api/jobs/") == 401
    words = entrypoint(service)
    job = ["ray", "job", "submit", "--address", search.address, "--"]
    said = search.ray(*job, "python", "-m", "cluster.doctor", "--storage", here.text("/shared/onethreshold"))
    assert "nothing to mend" in said
    for well in ("ray", "nodes", "mlflow", "artifacts", "database", "storage"):
        assert f"ok    {well}" in said
    search.ray(*job[:-1], "--submission-id", "first", "--no-wait", *job[-1:], *words)
    here.wait("search", lambda: "trial 0: started" in search.log("first"))
    search.ray("ray", "job", "stop", "--address", search.address, "first")
    said = search.ray(*job, *words)  # as the operator does when a job has failed
    assert "first-search goes on: 0 of 2 trials are done" in said
    assert "registered onethreshold version 1, alias champion" in said
    assert not [secret for values in here.secrets.values() for secret in values.values() if secret in said]
    studies = service.postgres.query(
        "optuna", "optuna", service.secret("postgres", "optuna-password"), "SELECT study_name FROM studies"
    )
    assert studies == "first-search"

    here.wait(endpoint.name, lambda: status(f"{url}/readyz") == 200)
    key = service.secret("api-key", "key")
    answer = asked(f"{url}/v1/embeddings", key, {"input": [STRIPE, STRIPE, BLANK]})
    (first, same, other) = (np.array(each["embedding"]) for each in answer["data"])
    assert answer["model"] == "onethreshold@1"
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-4)
    assert np.linalg.norm(first - same) < 1e-4 < np.linalg.norm(first - other)
    assert asked(f"{url}/v1/verify", key, {"a": STRIPE, "b": STRIPE, "far": 0.01})["match"] is True
    assert asked(f"{url}/v1/verify", key, {"a": STRIPE, "b": BLANK})["model"] == "onethreshold@1"
    assert (here.folder / "serving/galleries").is_dir()
    assert (here.folder / "serving/cache/models").is_dir(), "what it serves while MLflow is away"


def start_endpoint(service: Service) -> tuple[Head, str]:
    spec = service.manifests.get("RayService", "endpoint")["spec"]
    head = Head(service.here, "endpoint", service.cluster("RayService/endpoint"), cpus=1, redis=service.redis)
    config = yaml.safe_load(spec["serveConfigV2"])
    port = free_port()
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    arguments = config["applications"][0]["args"]
    arguments |= {"replicas": "1", "cpus": 0.5, "gpus": 0, "galleries": service.here.text(arguments["galleries"])}
    file = service.here.folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    head.ray("serve", "deploy", str(file), "--address", head.address)
    workers = spec["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    probe = workers["readinessProbe"]["httpGet"]["path"]
    service.here.wait("endpoint", lambda: status(f"http://127.0.0.1:{port}{probe}") == 200)
    healthy = f"http://127.0.0.1:{port}/healthz"
    service.here.wait("endpoint", lambda: status(healthy) == 200)
    return head, f"http://127.0.0.1:{port}"


def entrypoint(service: Service) -> list[str]:
    words = shlex.split(service.here.text(service.manifests.get("RayJob", "search")["spec"]["entrypoint"]))
    for option, value in SMALL.items():
        words[words.index(option) + 1] = value
    return [*words, *TINY]


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}


def asked(url: str, key: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return dict(json.load(answer))


def data_uri(image: Any) -> str:
    file = io.BytesIO()
    Image.fromarray((image * 255).astype(np.uint8)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


STRIPE = data_uri(np.kron(np.eye(4), np.ones((8, 8))))
BLANK = data_uri(np.zeros((32, 32)))

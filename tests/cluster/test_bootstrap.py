"""Secrets that are made once and never overwritten, against a server that speaks as Kubernetes does of Secrets."""

import base64
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from cluster import bootstrap
from serve.keys import Keys

NAMESPACE = "team"
PATH = f"/api/v1/namespaces/{NAMESPACE}/secrets"


class ApiServer(ThreadingHTTPServer):
    """Secrets of one namespace, for whoever brings the token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.secrets: dict[str, dict[str, str]] = {}
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: ApiServer

    def do_GET(self) -> None:
        name = self.path.removeprefix(f"{PATH}/")
        found = self.server.secrets.get(name)
        self._answer(404 if found is None else 200, {"data": found, "message": f'secrets "{name}" not found'})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = body["metadata"]["name"]
        if name in self.server.secrets:
            self._answer(409, {"message": f'secrets "{name}" already exists'})
            return
        assert (body["kind"], self.path) == ("Secret", PATH)
        encoded = {key: base64.b64encode(value.encode()).decode() for key, value in body["stringData"].items()}
        self.server.secrets[name] = encoded
        self._answer(201, {})

    def _answer(self, status: int, body: Any) -> None:
        self.server.requests.append((self.command, self.path))
        if self.headers["Authorization"] != "Bearer account-token":
            status, body = 403, {"message": "forbidden"}
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def api() -> Iterator[ApiServer]:
    with ApiServer() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def account(tmp_path: Path) -> Path:
    (tmp_path / "namespace").write_text(NAMESPACE)
    (tmp_path / "token").write_text("account-token\n")
    return tmp_path


def test_what_is_missing_is_made_and_what_is_there_stays(api: ApiServer, account: Path) -> None:
    assert bootstrap.make_secrets(api.url, account) == list(bootstrap.SECRETS)
    made = json.loads(json.dumps(api.secrets))
    assert {name: tuple(keys) for name, keys in made.items()} == bootstrap.SECRETS
    assert bootstrap.make_secrets(api.url, account) == [], "all are there"
    api.secrets.pop("redis")
    assert bootstrap.make_secrets(api.url, account) == ["redis"]
    assert api.secrets["redis"] != made["redis"]
    assert {**api.secrets, "redis": 0} == {**made, "redis": 0}
    assert {method for method, _ in api.requests} == {"GET", "POST"}, "no right to change or list is asked for"


def test_values_are_random_and_may_stand_anywhere() -> None:
    values = [value for _ in range(3) for name in bootstrap.SECRETS for value in bootstrap.values(name).values()]
    assert len(set(values)) == len(values)
    secret = [value for value in values if " " not in value]  # all but the line of the key's hash
    assert len(secret) == len(values) - 3
    assert all(re.fullmatch(r"[\w-]{43,}", value) for value in secret)


def test_the_endpoint_knows_the_key_by_its_hash() -> None:
    made = bootstrap.values("api-key")
    keys = Keys.parse(made["hashes"], "the Secret")
    assert keys.name_of(f"Bearer {made['key']}") == bootstrap.CLIENT
    assert keys.name_of(f"Bearer {bootstrap.values('api-key')['key']}") is None
    assert made["key"] not in made["hashes"]


def test_a_secret_that_lacks_a_key_is_named_and_left_alone(api: ApiServer, account: Path) -> None:
    api.secrets["postgres"] = {"postgres-password": "eA=="}
    with pytest.raises(ValueError, match="Secret postgres in namespace team has no mlflow-password, optuna-password"):
        bootstrap.make_secrets(api.url, account)
    assert api.secrets == {"postgres": {"postgres-password": "eA=="}}


def test_an_api_server_that_refuses_is_quoted(api: ApiServer, account: Path) -> None:
    (account / "token").write_text("another")
    with pytest.raises(ValueError, match="Secret postgres in namespace team: 403 forbidden"):
        bootstrap.make_secrets(api.url, account)


def test_an_mlflow_that_stays_away_is_given_up() -> None:
    with pytest.raises(ValueError, match=r"MLflow at http://127\.0\.0\.1:9 has not answered for 0 s"):
        bootstrap.make_users("http://127.0.0.1:9", ("admin", "x"), {}, wait=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: python -m cluster.bootstrap secrets | mlflow-users"),
        (["secret"], "usage: python -m cluster.bootstrap secrets | mlflow-users"),
        (["mlflow-users"], "MLFLOW_TRACKING_USERNAME is not set in the environment"),
        (["secrets"], "No such file or directory: '/var/run/secrets/kubernetes.io/serviceaccount/namespace'"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME", raising=False)
    assert bootstrap.main(words) == 2
    assert message in capsys.readouterr().err

"""What the doctor says of things that are well, away, or another version; the whole composition is in tests/k8s."""

import base64
import functools
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import doctor, nodes


def states(findings: Iterator[doctor.Finding]) -> dict[str, str]:
    return {finding.about: finding.state for finding in findings}


def named_as(real: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    """Another function by the name of the real one, which nodes go by."""
    return functools.wraps(real)(other)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A laptop without anything."""
    for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", doctor.DATABASE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_cluster_that_is_well(ray_local: None, mlflow_store: str, tmp_path: Path) -> None:
    """The real Ray and the real MLflow of the test session, of one node and SQLite."""
    found = {finding.about: finding for finding in doctor.examine(str(tmp_path / "kept"))}
    assert {name: finding.state for name, finding in found.items()} == {
        **dict.fromkeys(("versions", "ray", "nodes", "mlflow", "artifacts", "storage"), "ok"),
        "gpus": "note",
        "database": "note",
    }
    assert found["ray"].said == "1 nodes, 2 CPU, 0 GPU"
    assert found["storage"].said == f"{tmp_path / 'kept'}, on every node"
    assert list((tmp_path / "kept").iterdir()) == [], "nothing is left there"


def test_another_version_on_a_node_is_told(ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    here = nodes.versions()
    monkeypatch.setattr(nodes, "versions", named_as(nodes.versions, lambda: {**here, "torch": "2.0.0"}))
    finding = next(each for each in doctor.ray_cluster() if each.about == "nodes")
    assert finding.state == "fault"
    assert f"has torch {here['torch']}, here 2.0.0" in finding.said
    assert finding.mend == "give all pods, and this machine, the same image"


def test_what_is_away_is_named_with_what_to_mend(
    alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{nowhere}")
    monkeypatch.setenv(doctor.DATABASE, f"postgresql://me:secret@{nowhere}/studies")
    assert doctor.main(["--storage", "/proc/here"]) == 1
    said = capsys.readouterr().out
    assert f"fault mlflow    http://{nowhere}: " in said
    assert f"fault database  postgresql+psycopg://me:***@{nowhere}/studies: " in said
    assert "fault storage   /proc/here: " in said
    assert said.count("-> ") == 3
    assert said.endswith("3 to mend\n")
    assert "secret" not in said


@pytest.mark.parametrize(
    ("url", "state", "said"),
    [
        ("", "note", "studies go to SQLite on this machine"),
        ("nonsense", "fault", "is no URL of a database"),
        ("sqlite:///studies.db", "ok", "sqlite:///studies.db (sqlite 3."),
        ("sqlite:////no/such/folder/x.db", "fault", "unable to open database file"),
    ],
)
def test_databases(alone: Path, url: str, state: str, said: str) -> None:
    finding = doctor.database(url)
    assert finding.state == state
    assert said in finding.said


def test_an_mlflow_of_another_version_is_told(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"2.0.0")

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Old) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_address[1]}")
        [finding] = doctor.mlflow()
        server.shutdown()
    assert finding.state == "fault"
    assert f"is 2.0.0, here it is {nodes.versions()['mlflow']}" in finding.said


def test_an_mlflow_that_is_not_named_is_not_well(alone: Path) -> None:
    """As in a pod without the variable: nothing is asked, and nothing is left behind."""
    [finding] = doctor.mlflow()
    assert (finding.state, finding.said[:34]) == ("note", "MLFLOW_TRACKING_URI is not set: ru")
    assert list(alone.iterdir()) == []


@pytest.mark.parametrize(
    ("address", "known"),
    [("me:p%40ss@", "me:p@ss"), ("", "named:outside"), ("me@", "me:")],
)
def test_mlflow_is_asked_by_the_user_of_its_address_or_else_of_the_environment(
    alone: Path, monkeypatch: pytest.MonkeyPatch, address: str, known: str
) -> None:
    asked = []

    class Guarded(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(base64.b64decode(self.headers["Authorization"].removeprefix("Basic ")).decode())
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"2.0.0")

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "named")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "outside")
    with ThreadingHTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert doctor._get(f"http://{address}127.0.0.1:{server.server_address[1]}/version") == "2.0.0"
        server.shutdown()
    assert asked == [known]


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("Invalid Host header - possible DNS rebinding attack detected", "MLFLOW_SERVER_ALLOWED_HOSTS"),
        ("401 You are not authenticated", "MLFLOW_TRACKING_PASSWORD"),
        ("something else", "the server's log"),
    ],
)
def test_what_mlflow_refuses_has_its_own_hint(said: str, hint: str) -> None:
    assert hint in doctor._mend_mlflow(said)


def test_a_gpu_computes_or_the_doctor_hears_why_not(ray_local: None) -> None:
    """Without a GPU the answer is what a broken driver's would be: an error of torch."""
    [(address, answer)] = nodes.ask(nodes.compute, nodes.alive(), doctor.TIMEOUT)
    assert address == nodes.alive()[0]["NodeManagerAddress"]
    assert isinstance(answer, str if torch.cuda.is_available() else Exception), answer

"""`ray job submit -- python -m tune.search` against a running head over loopback, Ray's token authentication on."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from tests.servers import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

HERE = Path(__file__).parents[2]
SEARCH = ["python", "-m", "tune.search", "--recipe", "digits", "--trials", "1", "--train.epochs", "1"]


class Head:
    """A head of its own ports, with the environment's bin first on PATH and a token of its own."""

    def __init__(self, home: Path) -> None:
        port, self.dashboard, *others = free_ports(7)
        self.temporary = tempfile.mkdtemp(prefix="rj-")  # sockets' paths must be short
        self._log = home / "head.log"
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
        self.environment |= {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(home),  # where Ray keeps the token
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._ray("get-auth-token", "--generate")
        agents = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
        names = (*agents, "ray-client-server")
        own = [word for name, each in zip(names, others, strict=True) for word in (f"--{name}-port", str(each))]
        address = ["--port", str(port), "--dashboard-port", str(self.dashboard)]
        self._process = subprocess.Popen(
            ["ray", "start", "--head", "--block", "--num-cpus", "2", "--temp-dir", self.temporary, *address, *own],
            env=self.environment,
            cwd=home,
            stdout=self._log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def wait(self) -> None:
        """Returns when jobs are taken."""
        deadline = time.monotonic() + 120
        while self.submitted("--submission-id", "ready", "--", "true").returncode:
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, "no answer in two minutes"
            time.sleep(1)

    def submitted(self, *words: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
        """A job, and what its log says."""
        return self._ray("job", "submit", "--address", f"http://127.0.0.1:{self.dashboard}", *words, cwd=cwd)

    def stop(self) -> None:
        if self._process.poll() is None:
            for process in psutil.Process(self._process.pid).children(recursive=True):
                process.kill()
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _ray(self, *words: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["ray", *words], env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=300, check=False
        )


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    started = Head(tmp_path_factory.mktemp("home"))
    try:
        started.wait()
        yield started
    finally:
        started.stop()


def tracking(tmp_path: Path) -> str:
    return f'{{"env_vars": {{"MLFLOW_TRACKING_URI": "sqlite:///{tmp_path / "mlflow.db"}"}}}}'


def test_without_the_token_no_job_is_taken(head: Head) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{head.dashboard}/api/jobs/", timeout=30)
    assert refused.value.code == 401


def test_a_job_of_the_installed_package_shows_its_progress_and_keeps_all_outside(head: Head, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    words = [*SEARCH, "--trials", "2", "--storage", str(kept), "--name", "installed"]
    job = head.submitted("--runtime-env-json", tracking(tmp_path), "--", *words)
    assert job.returncode == 0, job.stdout + job.stderr
    for line in (
        "[0/2] trial 0: started",
        "trial 1: epoch 1/1  loss ",
        "[2/2] trial ",
        "alias champion",
        "succeeded",
    ):
        assert line in job.stdout
    assert {"installed", "optuna.db", "artifacts"} <= {path.name for path in kept.iterdir()}
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("onethreshold")
    assert experiment is not None
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["FINISHED"] * 3
    assert int(client.get_model_version_by_alias("onethreshold", "champion").version) == 1


def test_a_job_of_a_working_directory_runs_its_code(head: Head, tmp_path: Path) -> None:
    for package in ("dml", "cluster", "tune", "serve"):
        shutil.copytree(HERE / package, tmp_path / "project" / package, ignore=shutil.ignore_patterns("__pycache__"))
    search = " ".join([*SEARCH, "--storage", str(tmp_path / "kept"), "--name", "directory"])
    where = "python -c 'import dml; print(dml.__file__)'"
    options = ["--working-dir", ".", "--runtime-env-json", tracking(tmp_path)]
    job = head.submitted(*options, "--", "sh", "-c", f"{where} && {search}", cwd=tmp_path / "project")
    assert job.returncode == 0, job.stdout + job.stderr
    assert "/working_dir_files/_ray_pkg_" in job.stdout
    assert "alias champion" in job.stdout


def test_a_job_whose_results_would_be_thrown_away_is_refused(head: Head, tmp_path: Path) -> None:
    job = head.submitted("--", *SEARCH)
    assert job.returncode != 0
    assert (
        "error: in a job runs/ lies in a folder that Ray throws away: give --storage with a URI or an absolute path "
        "that every node sees and MLFLOW_TRACKING_URI in the job's environment"
    ) in job.stdout
    job = head.submitted(
        "--runtime-env-json", tracking(tmp_path), "--", *SEARCH, "--storage", "memory://x/y", "--name", "uri"
    )
    assert job.returncode != 0
    assert "error: optuna-storage: in a job runs/ is thrown away, and a database does not fit into memory://" in (
        job.stdout
    )

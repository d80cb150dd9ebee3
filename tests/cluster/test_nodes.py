"""Clusters of several nodes on this machine: nodes that go and come, and one that does not see what others see."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image
from ray.cluster_utils import Cluster

from cluster import embedding_table, registry
from cluster.tracking import Store
from tests import drivers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A head without CPUs; tests add nodes of one CPU each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


def start(here: Path, nodes: Cluster, *words: str) -> subprocess.Popen[str]:
    (here / "runs").mkdir()
    MlflowClient(store(here)).search_experiments()  # makes it, before two processes would at once
    settings = ["--recipe", "digits", "--no-figures"]
    return drivers.start(here, "cluster.train", *settings, *words, address=nodes.address)


def store(here: Path) -> str:
    return f"sqlite:///{here / 'runs' / 'mlflow.db'}"


def the_run(here: Path) -> Run | None:
    client = MlflowClient(store(here))
    experiment = client.get_experiment_by_name("onethreshold")
    found = client.search_runs([experiment.experiment_id]) if experiment is not None else []
    return found[0] if found else None


def history(here: Path, name: str) -> dict[int, float]:
    run = the_run(here)
    if run is None:
        return {}
    points = MlflowClient(store(here)).get_metric_history(run.info.run_id, name)
    assert len({point.step for point in points}) == len(points), "each step once, though some were trained twice"
    return {point.step: point.value for point in points}


def wait_for_ranks(here: Path, ranks: int, *, after: int = 0) -> int:
    """The step by which so many ranks have trained."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        steps = [step for step, value in history(here, "train/ranks").items() if value == ranks and step > after]
        if steps:
            return max(steps)
        time.sleep(0.5)
    raise AssertionError(f"{ranks} ranks never trained")


def kill(nodes: Cluster, node: Any) -> None:
    """As a machine goes: everything on it at once, by kill -9."""
    raylet = node.all_processes["raylet"][0].process
    family = [*psutil.Process(raylet.pid).children(recursive=True), psutil.Process(raylet.pid)]
    for process in family:
        process.send_signal(signal.SIGKILL)
    nodes.remove_node(node, allow_graceful=False)


def test_elastic_workers_shrink_and_grow_with_the_cluster(nodes: Cluster, tmp_path: Path) -> None:
    nodes.add_node(num_cpus=1)
    second = nodes.add_node(num_cpus=1)
    settings = {
        "train.epochs": 40,
        "train.steps-per-epoch": 60,
        "train.eval-every": 10,
        "train.checkpoint-every-steps": 40,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    driver = start(tmp_path, nodes, "--workers", "1:2", "--resize-seconds", "5", "--name", "elastic", *words)
    try:
        shrinks = wait_for_ranks(tmp_path, 2)
        kill(nodes, second)
        grows = wait_for_ranks(tmp_path, 1, after=shrinks)
        nodes.add_node(num_cpus=1)
        wait_for_ranks(tmp_path, 2, after=grows)
        driver.send_signal(signal.SIGINT)  # it has shown what there is to see
        said, _ = driver.communicate(timeout=100)
    finally:
        driver.kill()
    assert driver.returncode == 130
    assert "global batch 48 = 1 to 2 ranks x 24 to 48" in said
    assert "interrupted: python -m cluster.train --resume elastic goes on" in said
    losses = history(tmp_path, "train/loss")
    assert list(losses) == list(range(10, 10 * len(losses) + 1, 10))
    assert losses[10 * len(losses)] < losses[10]
    run = the_run(tmp_path)
    assert run is not None
    assert run.info.status == "KILLED"


def test_a_node_that_is_lost_is_made_up_for_when_another_comes(nodes: Cluster, tmp_path: Path) -> None:
    nodes.add_node(num_cpus=1)
    second = nodes.add_node(num_cpus=1)
    words = ["--train.epochs", "4", "--train.steps-per-epoch", "60", "--train.checkpoint-every-steps", "20"]
    driver = start(tmp_path, nodes, "--workers", "2", "--name", "fixed", *words)
    try:
        reached = wait_for_ranks(tmp_path, 2)
        kill(nodes, second)
        nodes.add_node(num_cpus=1)
        drivers.end(driver)
    finally:
        driver.kill()
    assert reached < 240
    assert list(history(tmp_path, "train/loss")) == list(range(10, 241, 10))


@contextmanager
def blind(nodes: Cluster, folder: Path) -> Iterator[None]:
    """A node of one CPU that lives behind a mount of its own: where the folder is, it sees an empty one."""
    ray = f"{sys.executable} -m ray.scripts.scripts start --block --num-cpus 1 --address {nodes.address}"
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    there = len(nodes.global_state.node_table())
    node = subprocess.Popen(
        ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs none {folder} && exec {ray}"], env=environment
    )
    try:
        deadline = time.monotonic() + 60
        while sum(node["Alive"] for node in nodes.global_state.node_table()) <= there:
            assert time.monotonic() < deadline, "the node did not join"
            time.sleep(0.5)
        yield
    finally:
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            process.kill()
        node.wait()


def test_what_a_node_does_not_see_is_refused_before_any_training(nodes: Cluster, tmp_path: Path) -> None:
    nodes.add_node(num_cpus=1)
    hidden, seen = tmp_path / "hidden", tmp_path / "seen"
    storage, home = hidden / "storage", hidden / "home"
    for folder in (storage, home, seen):
        folder.mkdir(parents=True)
    with blind(nodes, hidden):
        begun = [
            start(tmp_path, nodes, "--workers", "2", "--storage", str(storage)),
            drivers.start(tmp_path, "tune.search", "--recipe=digits", f"--storage={storage}", address=nodes.address),
            start(home, nodes, "--workers", "2", "--storage", str(seen)),
        ]
        said = [driver.communicate(timeout=200)[0] for driver in begun]
    assert [driver.returncode for driver in begun] == [1, 1, 1], said
    for each in said[:2]:
        assert re.search(f"storage: nodes .* do not see {storage}; give --storage a path .*, or a URI", each)
    assert re.search(f"MLFLOW_TRACKING_URI: nodes .* do not see {home}/runs; .* start one \\(mlflow server\\)", said[2])
    for folder in (storage, seen):
        assert list(folder.iterdir()) == [], "nothing is left there"


def test_embedding_on_a_node_that_is_not_the_drivers(
    nodes: Cluster, model: Path, mlflow_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fetches a registered model by itself; a folder of images that it does not see is refused."""
    hidden, seen = tmp_path / "hidden", tmp_path / "seen"
    for folder in (hidden / "photos", seen):
        folder.mkdir(parents=True)
        for number in range(3):
            Image.new("L", (8, 8), number).save(folder / f"{number}.png")
    monkeypatch.setenv("ONETHRESHOLD_CACHE", str(hidden / "cache"))
    run = MlflowClient(mlflow_store).create_run(Store.open().experiment).info.run_id
    registry.register(model, run_id=run, operating_points=[], metrics={}, name="elsewhere")

    def embed(data: Path) -> subprocess.CompletedProcess[str]:
        words = ["--model", "models:/elsewhere/1", "--data", data, "--out", tmp_path / f"{data.name}.parquet"]
        environment = {**os.environ, "RAY_ADDRESS": nodes.address}
        command = [sys.executable, "-m", "cluster.embed", *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)

    with blind(nodes, hidden):
        done, blindly = embed(seen), embed(hidden / "photos")
    assert "3 of 3 images embedded by elsewhere@1" in done.stdout, done.stderr
    assert embedding_table.count(tmp_path / "seen.parquet") == 3
    assert blindly.returncode == 1
    assert re.fullmatch(
        f"error: data: nodes .* do not see {hidden}/photos/0.png; give --data a path .* every node mounts\n",
        blindly.stderr,
    )

"""What dies is lost for seconds: workers, drivers and checkpoints, with real processes and real signals.

What two ranks come to without Ray, and without anything that goes wrong, is the measure, bit for bit.
"""

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from mlflow import MlflowClient

from dml import checkpoint, loop, recipes
from dml.data import datasets
from tests.ddp import ranks
from tests.drivers import end, start

SETTINGS = {"train.epochs": 3, "train.steps_per_epoch": 20, "train.checkpoint_every_steps": 8}
WORDS = ["--recipe", "digits", *(word for name, value in SETTINGS.items() for word in (f"--{name}", str(value)))]
Weights = dict[str, torch.Tensor]


def trained(rank: int, world: int, path: Path) -> None:
    config = recipes.digits().replace(**SETTINGS)
    *_, last = loop.train(config, datasets.load(config.data), device=torch.device("cpu"))
    assert isinstance(last, loop.EpochReport)
    if rank == 0:
        checkpoint.save(path, last.encoder, config, info={}, state=last.state)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    path = tmp_path_factory.mktemp("expected") / "last"
    ranks.run(2, trained, path)
    return weights(path)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)


def weights(folder: Path) -> Weights:
    parts = checkpoint.load_state(folder).parts
    return {f"{part}/{name}": value for part in ("encoder", "optimizer") for name, value in parts[part].items()}


def steps(here: Path, name: str) -> list[int]:
    """Steps of the checkpoints that there are, complete or not."""
    return sorted(int(path.name.split("-")[1]) for path in (here / "runs" / "ray" / name).glob("step-*"))


def wait_for_checkpoint(here: Path, name: str, step: int) -> None:
    deadline = time.monotonic() + 150
    while not any(found >= step for found in steps(here, name)):
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.02)


def workers(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    family = psutil.Process(driver.pid).children(recursive=True)
    return [process for process in family if process.name().startswith("ray::RayTrainW")]


def newest(here: Path, name: str) -> Path:
    return max((here / "runs" / "ray" / name).glob("step-*"))


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def mlflow_steps(here: Path, name: str) -> list[int]:
    client = MlflowClient(f"sqlite:///{here / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("onethreshold")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return [metric.step for metric in client.get_metric_history(run.info.run_id, name)]


def mlflow_runs(here: Path) -> list[str]:
    client = MlflowClient(f"sqlite:///{here / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("onethreshold")
    assert experiment is not None
    return [run.info.status for run in client.search_runs([experiment.experiment_id])]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_worker_goes_on_in_the_same_command(here: Path, expected: Weights) -> None:
    driver = start(here, "cluster.train", "--workers", "2", *WORDS, "--name", "worker")
    wait_for_checkpoint(here, "worker", 16)
    first = workers(driver)
    assert len(first) == 2
    first[1].send_signal(signal.SIGKILL)
    said = end(driver)
    assert not any(process.is_running() for process in first), "both were started anew"
    assert newest(here, "worker").name.startswith("step-000000060")
    assert_same(weights(newest(here, "worker")), expected)
    assert re.search(r"^best epoch \d: val Recall@1", said, re.MULTILINE)
    assert mlflow_runs(here) == ["FINISHED"], "one run, whatever died"
    assert re.search(r"^warning: ranks .* were lost .*; the training goes on from its newest", said, re.MULTILINE)
    read = sorted({*range(10, 61, 10), *range(8, 61, 8)})
    assert mlflow_steps(here, "train/loss") == read, "none twice, though some were trained twice"
    assert mlflow_steps(here, "val/opis") == [20, 40, 60]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_driver_and_a_broken_checkpoint_are_gone_on_from(here: Path, expected: Weights) -> None:
    driver = start(here, "cluster.train", "--workers", "2", *WORDS, "--name", "driver")
    wait_for_checkpoint(here, "driver", 24)
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.communicate(timeout=60)
    reached = steps(here, "driver")[-1]
    assert reached < 60

    said = end(start(here, "cluster.train", "--workers", "2", "--resume", "driver"))
    (after,) = re.findall(r"^driver goes on after step (\d+), from step-", said, re.MULTILINE)
    assert 16 <= int(after) <= reached
    assert_same(weights(newest(here, "driver")), expected)
    assert mlflow_runs(here) == ["FINISHED"], "the run that it began"

    optimizer = newest(here, "driver") / "optimizer.safetensors"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    said = end(start(here, "cluster.train", "--workers", "2", "--resume", "driver"))
    assert "optimizer.safetensors is truncated or altered" in said
    assert "driver goes on after step 56" in said, "the one before, within the last epoch"
    again = re.findall(r"^checkpoint (.*)$", said, re.MULTILINE)
    assert checkpoint.load(again[0]).config.train.epochs == 3
    whole = [path for path in (here / "runs" / "ray" / "driver").glob("step-000000060*") if path != optimizer.parent]
    assert_same(weights(whole[0]), expected)
    # Ray's own agents look for their parent now and then only, so this comes last.
    _, alive = psutil.wait_procs(family, timeout=120)
    assert alive == [], "the killed driver leaves no orphan process"

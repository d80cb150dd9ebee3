"""What is noted of the machine that a run is made on, and of the code."""

import subprocess
import time
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from cluster import environment, system_metrics
from cluster.tracking import Store


def test_the_machine_is_sampled_until_the_block_ends(
    mlflow_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Store.open().start("system", params={}, tags={})
    cpu = torch.device("cpu")
    with run.closing() as record, system_metrics.sampling(record, run.began, cpu, every=0.05):
        found = system_metrics.sample(cpu)
        torch.randn(500, 500) @ torch.randn(500, 500)
        time.sleep(1.5)
    assert 0 < found["system/system_memory_usage_percentage"] < 100
    assert found["system/process_memory_usage_megabytes"] > 50
    steps = [
        metric.step for metric in MlflowClient().get_metric_history(run.run_id, "system/cpu_utilization_percentage")
    ]
    assert len(steps) >= 1
    assert steps == sorted(set(steps)), "a second has one sample"


def test_a_commit_is_noted_where_there_is_one(tmp_path: Path) -> None:
    assert environment.commit(tmp_path) == {}

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    head = git("rev-parse", "HEAD")
    assert environment.commit(tmp_path) == {"mlflow.source.git.commit": head, "git.dirty": "false"}
    (tmp_path / "a").write_text("2")
    assert environment.commit(tmp_path)["git.dirty"] == "true"


def test_versions_and_hardware_are_named() -> None:
    tags = environment.describe()
    assert tags["env.torch"] == torch.__version__.split("+")[0]
    assert {"env.python", "env.onethreshold", "env.ray", "env.timm", "env.cpu", "env.memory", "env.host"} <= set(tags)
    assert ("env.gpu" in tags) == torch.cuda.is_available()

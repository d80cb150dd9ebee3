"""One training over two gloo ranks with real Ray Train and MLflow."""

import re
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient

from cluster import train
from dml import checkpoint, evaluate
from dml.data import datasets


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_local: None, mlflow_store: str) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_ranks_train_a_checkpoint_that_scores_as_it_says(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--recipe", "digits", "--workers", "2", "--train.epochs", "2", "--name", "pair"]) == 0
    said = capsys.readouterr().out
    assert "toy: two val classes say little about OPIS" in said

    (folder,) = re.findall(r"^checkpoint (.+)$", said, re.MULTILINE)
    model = checkpoint.load(folder)
    splits = datasets.load(model.config.data)
    again = evaluate.evaluate(model.encoder, splits.val, model.config, device=torch.device("cpu"))
    assert again == pytest.approx({name: model.info["metrics"][name] for name in again}, abs=1e-3)

    (run_id,) = re.findall(r"^MLflow run (\w+) in ", said, re.MULTILINE)
    run = mlflow.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "0.001"
    assert run.data.tags["data.fingerprint"] == splits.fingerprint
    steps = [metric.step for metric in MlflowClient().get_metric_history(run_id, "train/loss")]
    assert steps == sorted(set(steps)), "rank 0 alone logs, each step once"
    assert len(MlflowClient().get_metric_history(run_id, "val/opis")) == 2


def test_a_failed_training_says_why_and_is_not_left_running(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--recipe", "digits", "--name", "nan", "--optim.name", "sgd", "--optim.lr", "1e30", "--optim.clip", "0"]
    with pytest.raises(SystemExit) as stop:
        train.main(words)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "last losses: " in error
    (run,) = mlflow.search_runs(
        search_all_experiments=True, filter_string="tags.`mlflow.runName` = 'nan'", output_format="list"
    )
    assert run.info.status == "FAILED"


def test_more_workers_than_the_cluster_can_hold_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["--recipe", "digits", "--workers", "64"])
    assert stop.value.code == 1
    assert "64 workers with 1 CPU each need 64 CPU; the cluster has 2" in capsys.readouterr().err

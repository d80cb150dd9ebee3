"""Ctrl-C leaves a state from which the same command goes on: a real process, a real signal."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import psutil
import pytest
from mlflow import MlflowClient

SEARCH = ["--recipe", "digits", "--trials", "3", "--train.epochs", "8", "--early-stop", "none"]
COMMAND = [sys.executable, "-m", "tune.search", *SEARCH]


def statuses(here: Path) -> list[str]:
    client = MlflowClient(f"sqlite:///{here / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("onethreshold")
    assert experiment is not None
    return sorted(run.info.status for run in client.search_runs([experiment.experiment_id]))


@pytest.mark.slow
def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
    process = subprocess.Popen(COMMAND, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if "epoch 3/8" in line:
            family = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 130, "".join(said) + rest
    assert "interrupted: 0 of 3 trials are done and kept" in rest
    assert f"python -m {' '.join(COMMAND[2:])} --resume" in rest
    assert statuses(tmp_path) == ["KILLED"] * 3
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == [], "no orphan process"

    again = subprocess.run(
        [*COMMAND, "--resume"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "alias champion" in again.stdout
    assert statuses(tmp_path) == ["FINISHED"] * 4, "one parent, three trials, none twice"
    (study,) = optuna.get_all_study_summaries(f"sqlite:///{tmp_path / 'runs' / 'optuna.db'}")
    trials = optuna.load_study(
        study_name=study.study_name, storage=f"sqlite:///{tmp_path / 'runs' / 'optuna.db'}"
    ).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3

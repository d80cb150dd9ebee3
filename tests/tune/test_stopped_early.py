"""Trials that are stopped early, as a person runs them: a real process with a Ray of its own."""

import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from mlflow import MlflowClient


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stopped_trial_frees_its_workers_for_the_next(tmp_path: Path) -> None:
    """A learning rate that is far too large: every trial but the baseline falls behind at once."""
    environment = {key: value for key, value in os.environ.items() if key not in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS")}
    words = ["--recipe", "digits", "--train.epochs", "8", "--trials", "3", "--space", "optim.lr=[0.5]"]
    more = ["--trials-at-once", "1", "--workers-per-trial", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "tune.search", *words, *more],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=580, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trial 1 was stopped early" in done.stdout
    assert "trial 2 was stopped early" in done.stdout
    assert "alias champion (trial 0)" in done.stdout

    database = f"sqlite:///{tmp_path / 'runs' / 'optuna.db'}"
    (study,) = optuna.get_all_study_summaries(database)
    trials = optuna.load_study(study_name=study.study_name, storage=database).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "PRUNED"]
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("onethreshold")
    assert experiment is not None
    statuses = [run.info.status for run in client.search_runs([experiment.experiment_id])]
    assert statuses.count("FINISHED") == 2, "the search and the baseline"
    assert "RUNNING" not in statuses

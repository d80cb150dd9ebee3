"""A real training against a real MLflow server that is killed, comes back, and is killed for good."""

import time
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient

from cluster import outbox, tracking
from cluster.tracking import Run, Store
from cluster.worker import Job, tracked, work
from dml import recipes
from tests.cluster.mlflow_server import MLflowServer


@pytest.mark.slow
def test_a_server_that_goes_away_costs_a_training_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mlflow_store: str
) -> None:
    """Killed after epoch 2, back after epoch 4, killed for good after epoch 6 of 8."""
    monkeypatch.chdir(tmp_path)
    server = MLflowServer(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    settings = {"train.epochs": 8, "train.steps_per_epoch": 4, "train.log_every": 2}
    config = recipes.digits("short").replace(**settings)
    waiting: list[int] = []

    def report(metrics: dict[str, float | str], folder: Path | None) -> None:
        epoch = metrics["epoch"]
        waiting.append(len(list(outbox.waiting(tmp_path / "runs" / "outbox"))))
        if epoch == 4:
            server.start()
        if epoch == 6:
            until_sent(run, 24)
        if epoch in (2, 6):
            server.kill()

    def until_sent(run: Run, step: int) -> None:
        for _ in range(600):
            if any(metric.step == step for metric in client.get_metric_history(run.run_id, "train/loss_epoch")):
                return
            time.sleep(0.1)
        pytest.fail("the server is back and gets nothing")

    try:
        server.start()
        store = Store.open()
        client = MlflowClient(server.url)
        with tracked(Job(config, "outage", store, tags={"kind": "test"})) as job:
            assert job.run is not None
            run = job.run
            work(job, report, device=torch.device("cpu"))
        assert waiting[2:4] == [1, 1], "epochs 3 and 4 were trained and recorded without a server"
        warning = tracking.unsent_warning(run.unsent)
        assert warning.startswith(f"not everything has reached {server.url}; the rest lies in {run.unsent}. ")
        assert tracking.main(["flush"]) == 1
        assert "does not answer (Connection refused)" in capsys.readouterr().err

        server.start()
        assert client.get_run(run.run_id).info.status == "RUNNING"
        assert tracking.main(["flush"]) == 0
        assert tracking.main(["flush"]) == 0
        said = capsys.readouterr().out
        assert f"run {run.run_id}: " in said
        assert "nothing waits in" in said
        assert not run.unsent.exists()

        found = client.get_run(run.run_id)
        assert found.info.status == "FINISHED"
        steps = {name: [m.step for m in client.get_metric_history(run.run_id, name)] for name in found.data.metrics}
        every, epochs = [*range(2, 33, 2)], [*range(4, 33, 4)]
        trained = ("train/loss", "train/loss_base", "train/lr", "train/gradient_norm", "train/data_wait")
        assert {name: steps[name] for name in trained} == dict.fromkeys(trained, every)
        evaluated = ("val/recall_at_1", "val/opis", "train/pi_ratio", "train/loss_epoch", "best/score")
        assert {name: steps[name] for name in evaluated} == dict.fromkeys(evaluated, epochs)
        assert all(len(at) == len(set(at)) for at in steps.values())
    finally:
        server.kill()
        mlflow.set_tracking_uri(mlflow_store)

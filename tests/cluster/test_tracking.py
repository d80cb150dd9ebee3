"""MLflow runs: how they begin, go on, end, and what they hold."""

from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from cluster import tracking
from cluster.tracking import Run, Store


@pytest.fixture
def store(mlflow_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(tmp_path)
    return Store.open()


def status(run: Run) -> str:
    return str(mlflow.get_run(run.run_id).info.status)


def test_without_a_tracking_uri_the_store_is_under_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    before = mlflow.get_tracking_uri()
    try:
        assert tracking.connect() == f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    finally:
        mlflow.set_tracking_uri(before)


def test_metrics_are_kept_by_step_under_names_that_mlflow_allows(store: Store) -> None:
    run = store.start("metrics", params={"optim.lr": 0.1}, tags={"kind": "test"})
    with run.writing() as record:
        record.metrics({step: {"val/recall@1": step / 2000, "train/loss": 1.0} for step in range(1200)})
    history = MlflowClient().get_metric_history(run.run_id, "val/recall_at_1")
    assert [(metric.step, metric.value) for metric in history] == [(step, step / 2000) for step in range(1200)]
    assert mlflow.get_run(run.run_id).data.params == {"optim.lr": "0.1"}


def test_a_run_ends_as_its_block_does(store: Store) -> None:
    runs = [store.start(f"end {index}", params={}, tags={}) for index in range(3)]
    with runs[0].ending():
        pass
    with pytest.raises(ZeroDivisionError), runs[1].ending():
        raise ZeroDivisionError("by nothing")
    with pytest.raises(KeyboardInterrupt), runs[2].closing():
        raise KeyboardInterrupt
    assert [status(run) for run in runs] == ["FINISHED", "FAILED", "KILLED"]
    assert mlflow.get_run(runs[1].run_id).data.tags["error"] == "ZeroDivisionError: by nothing"


def test_a_key_goes_on_with_its_run(store: Store) -> None:
    first = store.start("trial", params={"a": 1}, tags={}, key="search/7")
    with first.closing():
        pass
    again = store.start("trial", params={"a": 1}, tags={}, key="search/7")
    assert again == first
    assert status(again) == "RUNNING"
    assert store.start("trial", params={"a": 1}, tags={}, key="search/8") != first


def test_what_a_stopped_search_left_running_is_ended(store: Store) -> None:
    parent = store.start("parent", params={}, tags={})
    children = [store.start(f"child {n}", params={}, tags={}, parent=parent.run_id) for n in range(3)]
    with children[0].closing():
        pass
    assert store.end_children(parent.run_id) == 2
    assert [status(run) for run in children] == ["FINISHED", "KILLED", "KILLED"]
    assert status(parent) == "RUNNING"

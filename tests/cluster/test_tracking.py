"""MLflow runs: how they begin, go on, end, and what they hold."""

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from cluster import delivery, tracking
from cluster.outbox import Outbox, OutboxInUse
from cluster.tracking import Run, Store, TrackingError
from cluster.writer import metric_name


@pytest.fixture
def store(mlflow_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.chdir(tmp_path)
    return Store.open()


def history(run: Run, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in MlflowClient().get_metric_history(run.run_id, name)]


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
    assert history(run, "val/recall_at_1") == [(step, step / 2000) for step in range(1200)]
    assert not run.unsent.exists()
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


def test_steps_that_are_trained_again_are_not_there_twice(store: Store) -> None:
    """A resumed run says again, at another time, what it said between its checkpoint and its end."""
    run = store.start("resumed", params={}, tags={}, key="resumed")
    with run.writing() as record:
        for step in range(10):
            record.metrics({step: {"train/loss": 10.0 - step}})
        record.metrics({4: {"val/opis": 0.2}})
        record.status("KILLED")
    again = store.start("resumed", params={}, tags={}, key="resumed")
    with again.writing() as record:
        for step in range(5, 15):
            record.metrics({step: {"train/loss": 10.0 - step}})
        record.metrics({4: {"val/opis": 0.2}, 9: {"val/opis": 0.1}})
    assert history(run, "train/loss") == [(step, 10.0 - step) for step in range(15)]
    assert history(run, "val/opis") == [(4, 0.2), (9, 0.1)]
    assert status(run) == "RUNNING"


def test_a_summary_that_is_said_again_holds_as_it_was_said_last(store: Store) -> None:
    run = store.start("summary", params={}, tags={}, key="summary")
    with run.closing() as record:
        record.summary({"test/winner/recall@1": 0.9})
    with store.start("summary", params={}, tags={}, key="summary").closing() as record:
        record.summary({"test/winner/recall@1": 0.8})
    assert mlflow.get_run(run.run_id).data.metrics == {"test/winner/recall_at_1": 0.8}


def test_what_is_sent_twice_is_there_once(store: Store) -> None:
    """As after a crash between sending and marking; also where only a part had been sent."""
    run = store.start("twice", params={}, tags={})
    box = Outbox(run.unsent)
    for step in range(700):
        box.append({"metrics": {"train/loss": step / 2}, "step": step, "time": 1_700_000_000_000 + step})
    records, _ = box.unsent(300)
    delivery.Delivery(run.uri, run.run_id, run.unsent)(records)
    (run.unsent / "uri").write_text(run.uri)
    box.close()
    assert delivery.flush(Path(store.outbox)) == 0
    assert history(run, "train/loss") == [(step, step / 2) for step in range(700)]


def test_the_end_of_a_run_that_is_gone_on_with_is_no_end(store: Store) -> None:
    """FAILED had not reached the server when the run was resumed."""
    run = store.start("ended", params={}, tags={}, key="ended")
    box = Outbox(run.unsent)
    box.append({"status": "FAILED", "time": 1_700_000_000_000})
    box.close()
    again = store.start("ended", params={}, tags={}, key="ended")
    with again.writing() as record:
        record.metrics({1: {"train/loss": 1.0}})
    assert status(run) == "RUNNING"
    with again.ending():
        pass
    assert status(run) == "FINISHED"


def test_artifacts_go_the_same_way(store: Store, tmp_path: Path) -> None:
    run = store.start("artifacts", params={}, tags={})
    (tmp_path / "made" / "figures").mkdir(parents=True)
    (tmp_path / "made" / "figures" / "a.txt").write_text("a")
    with run.closing() as record:
        record.json({"x": 1}, "summary.json")
        record.files(tmp_path / "made", "evaluation")
    found = Path(mlflow.artifacts.download_artifacts(run_id=run.run_id, dst_path=str(tmp_path / "there")))
    assert json.loads((found / "summary.json").read_text()) == {"x": 1}
    assert (found / "evaluation" / "figures" / "a.txt").read_text() == "a"
    assert not run.unsent.exists()


@pytest.mark.parametrize(
    ("name", "allowed"),
    [("val/recall@1", "val/recall_at_1"), ("loss[a]=b", "loss_a__b"), ("a.b-c d:e/f", "a.b-c d:e/f")],
)
def test_names_that_mlflow_refuses_are_mended(name: str, allowed: str) -> None:
    assert metric_name(name) == allowed


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://me:secret@host:5000/mlflow", "http://host:5000/mlflow"),
        ("http://host:5000", "http://host:5000"),
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("postgresql+psycopg://u:p@db/x", "postgresql+psycopg://db/x"),
    ],
)
def test_no_password_is_shown_or_written_down(uri: str, shown: str) -> None:
    assert delivery.without_password(uri) == shown


def test_a_server_that_is_away_at_the_start_is_one_line(monkeypatch: pytest.MonkeyPatch, mlflow_store: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    try:
        with pytest.raises(TrackingError) as error:
            Store.open()
    finally:
        mlflow.set_tracking_uri(mlflow_store)
    assert str(error.value) == "MLflow at http://127.0.0.1:9: does not answer (Connection refused)"
    assert error.value.away


def test_a_run_that_nobody_knows_keeps_its_records(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(store.uri, "0" * 32, store.outbox, 0)
    with run.writing() as record:
        record.tags({"a": "b"})
    assert "python -m cluster.tracking flush" in tracking.unsent_warning(run.unsent)
    assert tracking.main(["flush"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: run {run.run_id}: ")
    assert str(run.unsent) in said
    assert run.unsent.exists()


def test_flush_with_nothing_to_send_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking.main(["flush"]) == 0
    assert capsys.readouterr().out == f"nothing waits in {tmp_path / 'runs' / 'outbox'}\n"


def test_unsent_records_wait_beside_the_checkpoints_where_there_is_a_folder_for_them(store: Store) -> None:
    assert Store.open("/shared/models").outbox == "/shared/models/outbox"
    assert Store.open("s3://bucket/models").outbox == Store.open().outbox == str(Path("runs/outbox").absolute())


def test_a_server_that_goes_away_while_a_run_begins_has_its_settings_later(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as away:
        away.setattr(MlflowClient, "log_batch", _raise(MlflowException("away")))
        with pytest.raises(TrackingError):
            store.start("cut", params={"optim.lr": 0.1}, tags={}, key="cut/1")
    for _ in range(2):
        run = store.start("cut", params={"optim.lr": 0.1}, tags={}, key="cut/1")
    assert mlflow.get_run(run.run_id).data.params == {"optim.lr": "0.1"}


def test_a_run_that_another_process_writes_is_left_to_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = store.start("taken", params={}, tags={})
    waited = []

    def impatient(folder: Path, wait: float) -> Outbox:
        waited.append(wait)
        return Outbox(folder, wait=0.0)

    monkeypatch.setattr(tracking, "Outbox", impatient)
    with Outbox(run.unsent), pytest.raises(OutboxInUse), run.closing():
        pass
    assert waited == [60.0]
    assert status(run) == "RUNNING"


def _raise(error: Exception) -> Any:
    def raises(*_: object, **__: object) -> None:
        raise error

    return raises

"""One training over two gloo ranks with real Ray Train and MLflow."""

import re
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient

from cluster import train
from cluster.run_folder import Record, RunFolder
from dml import checkpoint, encoders, evaluate, recipes
from dml.data import datasets


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_local: None, mlflow_store: str) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_ranks_train_a_checkpoint_that_scores_as_it_says(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--recipe", "digits", "--workers", "2", "--train.epochs", "2", "--tcm.weight", "0.1", "--name", "pair"]
    assert train.main(words) == 0
    said, complained = capsys.readouterr()
    assert complained == ""
    assert "global batch 48 = 2 ranks x 24 (6 classes x 8 images); 23 steps an epoch, 2 epochs" in said
    epochs = re.findall(r"^epoch (\d)/2  loss \d\.\d{4}  val Recall@1 .* OPIS .* images/s", said, re.MULTILINE)
    assert epochs == ["1", "2"], "a line an epoch, whatever the ranks"
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
    assert run.data.tags["checkpoint"] == folder
    assert "env.torch" in run.data.tags
    client = MlflowClient()

    def steps(name: str) -> list[int]:
        return [metric.step for metric in client.get_metric_history(run_id, name)]

    in_steps = ("train/loss", "train/loss_base", "train/tcm/hard_negatives", "train/gradient_norm", "train/data_wait")
    assert {name: steps(name) for name in in_steps} == {name: [10, 20, 23, 30, 40, 46] for name in in_steps}
    in_epochs = ("val/opis", "train/pi_ratio", "train/spectral_decay", "best/score")
    assert {name: steps(name) for name in in_epochs} == {name: [23, 46] for name in in_epochs}
    assert steps("val/auc") == [model.info["step"]], "of the best checkpoint, measured at the end"
    figures = {Path(file.path).stem for file in client.list_artifacts(run_id, "evaluation/figures")}
    assert {"utility", "distances", "neighbours", "map"} <= figures
    assert not any(Path("runs/outbox").iterdir()), "everything has arrived"

    # Another season: other classes, from this encoder, at a rate of almost nothing.
    words = ["--recipe", "digits", "--init", folder, "--data.split-seed", "1", "--name", "season"]
    still = ["--optim.lr", "1e-30", "--optim.weight-decay", "0", "--train.epochs", "1", "--train.steps-per-epoch", "1"]
    assert train.main([*words, *still, "--no-figures"]) == 0
    (warm,) = re.findall(r"^checkpoint (.+)$", capsys.readouterr().out, re.MULTILINE)
    after = checkpoint.load(warm)
    for name, value in model.encoder.state_dict().items():
        torch.testing.assert_close(after.encoder.state_dict()[name], value, rtol=1e-6, atol=1e-8)
    assert after.info["init"] == folder
    (season,) = mlflow.search_runs(
        search_all_experiments=True, filter_string="tags.`mlflow.runName` = 'season'", output_format="list"
    )
    assert season.data.tags["init"] == folder


def test_a_tracking_server_that_is_away_is_an_error_before_training(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mlflow_store: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    try:
        with pytest.raises(SystemExit) as stop:
            train.main(["--recipe", "digits"])
    finally:
        mlflow.set_tracking_uri(mlflow_store)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: MLflow at http://127.0.0.1:9: does not answer (Connection refused)\n"


def test_a_failed_training_says_why_and_is_not_left_running(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--recipe", "digits", "--name", "nan", "--optim.name", "sgd", "--optim.lr", "1e30", "--optim.clip", "0"]
    words += ["--quiet"]
    with pytest.raises(SystemExit) as stop:
        train.main(words)
    assert stop.value.code == 1
    said, error = capsys.readouterr()
    assert said == "", "quiet"
    assert error.startswith("error: rank 0: NonFiniteLossError: loss is ")
    assert error.count("\n") == 1
    assert "last losses: " in error
    (run,) = mlflow.search_runs(
        search_all_experiments=True, filter_string="tags.`mlflow.runName` = 'nan'", output_format="list"
    )
    assert run.info.status == "FAILED"


def test_more_workers_than_the_cluster_can_hold_are_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["--recipe", "digits", "--workers", "32"])
    assert stop.value.code == 1
    assert "32 workers with 1 CPU each need 32 CPU; the cluster has 2" in capsys.readouterr().err


REFUSED = {
    "another setting": (["--optim.lr", "0.5"], "but optim.lr is 0.5, was 0.001"),
    "another recipe": (["--recipe", "glyphs"], "--recipe does not go with --resume"),
    "another beginning": (["--init", "best"], "--init does not go with --resume"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_is_resumed_with_the_settings_that_it_began_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    words, message = REFUSED[case]
    RunFolder(str(tmp_path), "autumn").begin(Record(recipes.digits(), "autumn/1", resources={"workers": 2}))
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", "autumn", "--storage", str(tmp_path), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_that_does_not_exist_is_answered_with_those_that_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunFolder(str(tmp_path), "autumn").begin(Record(recipes.digits(), "autumn/1"))
    with pytest.raises(SystemExit) as stop:
        train.main(["--resume", "atumn", "--storage", str(tmp_path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip().endswith(f"no run 'atumn' in {tmp_path}; runs there: autumn")


def test_another_encoder_than_that_of_the_checkpoint_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipes.digits()
    built = encoders.build(config.encoder, channels=1, image_size=16)
    checkpoint.save(here / "model", built, config, info={})
    with pytest.raises(SystemExit) as stop:
        train.main(["--recipe", "digits", "--init", "model", "--encoder.dim", "32", "--name", "narrow"])
    assert stop.value.code == 1
    assert "small_cnn, channels 1, dim 64; this training's is small_cnn, channels 1, dim 32" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["--recipe", "digits", "--init", "models:/onethreshold@autumn"])
    assert "models:/onethreshold@autumn is not in the MLflow registry" in capsys.readouterr().err
    assert not list((here / "runs").glob("ray/*")), "no run was begun"

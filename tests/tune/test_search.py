"""A whole search on the toy digits with real Ray, Optuna and MLflow: what it prints and what it leaves behind."""

import re
from pathlib import Path

import mlflow
import numpy as np
import optuna
import pytest
import ray
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from cluster import messages, registry, session
from cluster.run_folder import Record, RunFolder
from cluster.tracking import Store
from dml import checkpoint, recipes
from tune import search
from tune.options import Options
from tune.progress import Progress
from tune.trial import Study

DIGITS = ["--recipe", "digits", "--train.epochs", "2"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_local: None, mlflow_store: str) -> Path:
    """A search in a folder of its own, with the session's Ray and MLflow store."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runs_of(name: str) -> tuple[Run, list[Run]]:
    """The parent run of the newest search of this name and its trials by number."""
    parent, *_ = mlflow.search_runs(
        search_all_experiments=True, filter_string=f"attributes.run_name = '{name}'", output_format="list"
    )
    trials = mlflow.search_runs(
        search_all_experiments=True,
        filter_string=f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'",
        output_format="list",
    )
    return parent, sorted(trials, key=lambda run: int(run.data.tags["trial"]))


def study_of(name: str, here: Path) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{here / 'runs' / 'optuna.db'}")


def test_a_search_ends_with_a_champion(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main([*DIGITS, "--trials", "4", "--name", "whole", "--model-name", "whole"]) == 0

    said = capsys.readouterr().out
    for words in (
        "4 trials (short budget",
        "[4/4] trial ",
        "Trials by score on val classes",
        "2 test classes, unseen until now",
        "toy: two val and two test classes say little about OPIS",
        "alias champion",
        "trial overhead: ",
        "make ui",
        "make serve",
    ):
        assert words in said

    parent, trials = runs_of("whole")
    assert parent.info.status == "FINISHED"
    assert [run.info.status for run in trials] == ["FINISHED"] * 4
    assert [float(run.data.params["tcm.weight"]) == 0 for run in trials] == [True, False, False, False]
    assert all({"val/recall_at_1", "val/opis", "best/score"} <= set(run.data.metrics) for run in trials)
    assert {"test/baseline/opis", "test/winner/opis", "test/opis_change"} <= set(parent.data.metrics)
    figures = [item.path for item in MlflowClient().list_artifacts(parent.info.run_id, "figures")]
    assert figures == ["figures/search.png", "figures/utility.png"]
    assert [run.data.tags["state"] for run in trials] == ["finished"] * 4
    assert {"trials/finished", "val/baseline/opis", "val/winner/recall_at_1"} <= set(parent.data.metrics)
    page = Path(mlflow.artifacts.download_artifacts(run_id=parent.info.run_id, artifact_path="report.html")).read_text()
    for words in (
        "<h1>Search whole</h1>",
        "2 test classes, which no choice has seen",
        "python -m tune.search --recipe",
    ):
        assert words in page
    assert (here / "runs" / "ray" / "whole" / "report.html").read_text() == page

    assert [trial.state.name for trial in study_of("whole", here).trials] == ["COMPLETE"] * 4

    champion = registry.champion("whole")
    assert champion is not None
    assert parent.data.tags["champion"] == parent.data.tags["registered"] == "whole/1"
    assert champion.run_id == trials[int(parent.data.tags["winner"])].info.run_id
    model = checkpoint.load(registry.download(champion))
    assert model.config.data.dataset == "digits"
    assert (registry.download(champion) / registry.OPERATING_POINTS).is_file()
    chosen = trials[int(parent.data.tags["winner"])]
    assert model.info["metrics"]["val/score"] == chosen.data.metrics["best/score"], "the best epoch's weights"

    latest = Progress.latest
    assert latest is not None
    assert len(latest.overhead.first) + len(latest.overhead.later) == 4
    assert latest.overhead.later, "processes are reused between trials"


@pytest.mark.slow
def test_trials_over_two_workers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        search.main(
            [*DIGITS, "--trials", "2", "--workers-per-trial", "2", "--name", "two-workers", "--promote", "always"]
        )
        == 0
    )
    assert "alias champion" in capsys.readouterr().out
    parent, trials = runs_of("two-workers")
    assert [run.info.status for run in [parent, *trials]] == ["FINISHED"] * 3
    for run in trials:
        left = ray.get(ray.remote(messages.take).remote(run.info.run_id))
        assert left == [], "nobody would take them"


def test_a_trial_without_a_finite_loss_fails_and_the_search_goes_on(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TCM with an absurd factor is infinite at once; the baseline does not have it."""
    words = [*DIGITS, "--trials", "3", "--name", "overflow", "--promote", "always", "--tcm.weight-pos", "1e39"]
    assert search.main(words) == 0
    said = capsys.readouterr().out
    cause = r"^\[\d/3\] trial \d: failed: .*NonFiniteLossError: loss is .*; last losses: "
    assert len(re.findall(cause, said, re.MULTILINE)) == 2
    assert "alias champion (trial 0)" in said
    _, trials = runs_of("overflow")
    assert [run.info.status for run in trials] == ["FINISHED", "FAILED", "FAILED"]
    assert "NonFiniteLossError: loss is " in trials[1].data.tags["error"]
    assert " at step " in trials[1].data.tags["error"]
    assert [trial.state.name for trial in study_of("overflow", here).trials] == ["COMPLETE", "FAIL", "FAIL"]


@pytest.mark.parametrize(
    ("trials", "message"),
    [("2", "no trial of 2 finished"), ("9", r"the first [34] trials have all failed, and the search is given up")],
)
def test_when_every_trial_fails_the_search_says_why(
    here: Path, capsys: pytest.CaptureFixture[str], trials: str, message: str
) -> None:
    """Both are named alike, and neither takes over the other's MLflow runs."""
    words = [*DIGITS, "--trials", trials, "--name", "hopeless", "--optim.name", "sgd", "--optim.lr", "1e30"]
    with pytest.raises(SystemExit) as stop:
        search.main([*words, "--optim.clip", "0"])
    assert stop.value.code == 1
    cause = r".*; the first failure: rank 0: NonFiniteLossError: loss is "
    assert re.search(message + cause, capsys.readouterr().err)
    parent, ran = runs_of("hopeless")
    assert parent.data.params["trials"] == trials
    assert len(ran) <= 4
    assert {run.info.status for run in [parent, *ran]} == {"FAILED"}
    assert {run.data.tags["state"] for run in ran} == {"failed"}
    page = Path(mlflow.artifacts.download_artifacts(run_id=parent.info.run_id, artifact_path="report.html")).read_text()
    assert "No trial finished, so nothing was chosen. The first failure: " in page


@pytest.mark.slow
def test_a_folder_of_photographs_is_searched(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """People's own data: a folder a class, any size and mode, and a class of one image that is set aside."""
    rng = np.random.default_rng(0)
    for index in range(12):
        colour = rng.integers(0, 255, 3)
        for sample in range(1 if index == 11 else 5):
            size = (int(rng.integers(40, 90)), int(rng.integers(40, 90)))
            noise = rng.normal(colour, 25, (*size, 3)).clip(0, 255).astype(np.uint8)
            path = here / "photos" / f"colour-{index:02}" / f"{sample}.{'png' if sample % 2 else 'jpg'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise).save(path)
    words = ["--recipe", "image_folder", "--data.root", "photos", "--trials", "2", "--train.epochs", "1"]
    tiny = ["--encoder.no-pretrained", "--encoder.name", "small_cnn", "--data.image-size", "32", "--batch.classes", "4"]
    assert search.main([*words, *tiny, "--name", "photos", "--promote", "always", "--evaluate.far-min", "0.05"]) == 0
    assert "alias champion" in capsys.readouterr().out


@pytest.mark.slow
def test_the_finalists_decide_over_new_seeds(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--objective.mode", "pareto", "--space", "optim.lr=log(1e-4,1e-2)", "--seeds", "2", "--finalists", "1"]
    assert search.main([*DIGITS, "--trials", "2", *words, "--name", "finals", "--model-name", "finals"]) == 0
    said = capsys.readouterr().out
    for line in (
        "Pareto front on val classes, by Recall@1:",
        "2 finalists over 2 new seeds: 4 trainings",
        "[0/4] trial 0, seed 1: started",
        "means over 2 new seeds; change from the baseline +- 95 %",
        "the knee of the front of Recall@1 and OPIS within the tolerance",
        "alias champion",
    ):
        assert line in said
    parent, runs = runs_of("finals")
    finals = [run for run in runs if run.data.tags["kind"] == "final"]
    seeds = sorted((run.data.tags["trial"], run.data.params["train.seed"]) for run in finals)
    assert seeds == [("0", "1"), ("0", "2"), ("1", "1"), ("1", "2")]
    assert [run.data.tags["state"] for run in finals] == ["finished"] * 4
    assert parent.data.params["space"].endswith("optim.lr=log(0.0001,0.01)")
    change, low, high = (parent.data.metrics[f"finals/opis_change{end}"] for end in ("", "/low", "/high"))
    assert low <= change <= high
    champion = registry.champion("finals")
    assert champion is not None
    assert champion.run_id in [run.info.run_id for run in finals]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--space", "optim.lrr=log(1e-5,1e-3)"], "unknown setting 'optim.lrr'; valid: optim.lr"),
        (["--space", "optim.lr=log(0,1)"], "--space optim.lr: log(0,1) needs low > 0"),
        (["--sampler", "cmaes"], "--sampler"),
        (["--seeds", "-1"], "seeds: -1 is too few; at least 0"),
        (["--wait-for-resources", "-1"], "wait-for-resources: -1 is too few; at least 0"),
        (["--give-up-after", "-1"], "give-up-after: -1 is too few; at least 0"),
        (["--name", "taken"], "has a search taken; --resume taken goes on with it"),
        (["--name", "it's"], "is not made of letters, digits"),
        (["--trials", "0"], "trials: 0 is too few; at least 1"),
        (["--model-name", "a/b"], "model-name: 'a/b' is no name of a registered model"),
        (["--name", "studied"], "optuna.db has a study studied already; give another --name"),
        (["--name", "new", "--optuna-storage", "sqlite:////no/such/optuna.db"], "unable to open database file"),
    ],
)
def test_a_search_that_cannot_begin_is_refused_before_ray(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    RunFolder(str(tmp_path / "runs" / "ray"), "taken", "search").begin(Record(recipes.digits(), "taken"))
    optuna.create_study(study_name="studied", storage=f"sqlite:///{tmp_path / 'runs' / 'optuna.db'}").ask()
    with pytest.raises(SystemExit) as stop:
        search.main([*DIGITS, *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "runs" / "ray").iterdir()] == ["taken"], "nothing is begun"


def test_an_interrupted_search_says_how_to_go_on_though_mlflow_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config, store = recipes.digits("short"), Store("http://me:secret@127.0.0.1:9", "0", str(tmp_path))
    study = Study("cut", "cut/1", config, session.Resources(), str(tmp_path), store, parent="0")
    with pytest.raises(SystemExit) as stop:
        search._stop([], Options(config), study)
    assert stop.value.code == 130
    assert "python -m tune.search --resume cut" in capsys.readouterr().out

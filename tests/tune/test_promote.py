"""From a search's runs to the champion and back, with real Ray, MLflow and models; and a last training on most of val.

One small search on the digits, which registers its winner as version 1 of `digits` and promotes nothing, is shared.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient

from cluster import registry
from cluster.session import Resources
from cluster.tracking import Store
from dml import checkpoint, evaluate
from dml.data import datasets
from dml.metrics.distance_histograms import DistanceHistograms
from dml.metrics.operating_points import OperatingPoint
from dml.metrics.pair_distances import pair_distances
from dml.metrics.transfer import transfer
from tune import candidate, promote, retrain, search

DIGITS = ["--recipe", "digits", "--data.val-fraction", "0.4", "--batch.classes", "4", "--train.epochs", "1"]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Search:
    """What a search left behind: run ids, and the checkpoints of its trials by number."""

    run_id: str
    trials: dict[int, str]
    checkpoints: dict[int, str]
    registered: str


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, ray_local: None, mlflow_store: str) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("promote")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ONETHRESHOLD_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def searched(here: Path) -> Search:
    words = ["--trials", "2", "--name", "promoted", "--model-name", "digits", "--promote", "never"]
    assert search.main([*DIGITS, *words]) == 0
    return left_by("promoted")


def left_by(name: str) -> Search:
    (parent,) = mlflow.search_runs(
        search_all_experiments=True, filter_string=f"attributes.run_name = '{name}'", output_format="list"
    )
    text = mlflow.artifacts.load_text(f"runs:/{parent.info.run_id}/{candidate.MODELS}")
    rows = [row for row in json.loads(text) if row["seed"] is None]
    return Search(
        parent.info.run_id,
        {row["trial"]: row["run_id"] for row in rows},
        {row["trial"]: row["checkpoint"] for row in rows},
        parent.data.tags["registered"],
    )


def last_of(name: str) -> int:
    return max(int(version.version) for version in MlflowClient().search_model_versions(f"name = '{name}'"))


def test_a_search_registers_its_winner_with_a_card_whatever_becomes_of_the_alias(searched: Search) -> None:
    assert searched.registered == "digits/1"
    assert registry.champion("digits") is None
    version = registry.find("models:/digits/1")
    assert version is not None
    folder = registry.download(version)
    model = checkpoint.load(folder)
    splits = datasets.load(model.config.data)
    stored = MlflowClient().get_model_version("digits", "1")
    assert stored.tags["data.fingerprint"] == model.info["fingerprint"] == splits.fingerprint
    assert stored.tags["promotion"] == "not champion: --promote never"

    card = (folder / registry.MODEL_CARD).read_text()
    assert stored.description == card
    for words in ("# digits", "## Trained on", "## How good", "## Thresholds", "## Classes that fare worst", "A toy"):
        assert words in card
    assert {name for name in splits.test.classes if f"`{name}`" in card} == {*splits.test.classes}


def test_thresholds_are_set_on_val_and_put_to_the_test_on_test(searched: Search) -> None:
    version = registry.find("models:/digits/1")
    assert version is not None
    folder = registry.download(version)
    model = checkpoint.load(folder)
    splits = datasets.load(model.config.data)
    val, test = (
        (evaluate.embed(model.encoder, part, model.config, device=CPU), torch.from_numpy(part.labels_N))
        for part in (splits.val, splits.test)
    )
    stored = [OperatingPoint(**row) for row in json.loads((folder / registry.OPERATING_POINTS).read_text())]
    expected = evaluate.calibrate(*val, model.config.evaluate)
    assert [point.threshold for point in stored] == pytest.approx([point.threshold for point in expected], abs=1e-5)
    tested = json.loads((folder / registry.EVALUATION).read_text())
    held = transfer(stored, *test, names=splits.test.classes)
    assert [each["far"] for each in tested["transfer"]] == pytest.approx([each.far for each in held], abs=1e-3)
    assert [each["frr"] for each in tested["transfer"]] == pytest.approx([each.frr for each in held], abs=1e-3)
    assert tested["splits"]["val"] == {"classes": 4, "images": len(splits.val)}
    counted = DistanceHistograms.of_dict(tested["distances"])
    assert (sum(counted.positives), sum(counted.negatives)) == (stored[0].positives, stored[0].negatives)
    assert counted.negatives == pytest.approx(DistanceHistograms.of(pair_distances(*val)).negatives, abs=3)


def test_a_runs_model_is_tested_beside_its_searchs_baseline_and_registered(
    searched: Search, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first champion of a name needs to beat nobody."""
    assert promote.main([searched.trials[1], "--model-name", "from-run"]) == 0
    said = capsys.readouterr().out
    assert "| without TCM |" in said
    assert "registered from-run version 1" in said
    assert "from-run@champion is version 1 now: there was no champion" in said
    champion = registry.champion("from-run")
    assert champion is not None
    assert champion.run_id == searched.trials[1]
    best = checkpoint.load(searched.checkpoints[1]).encoder.state_dict()
    kept = checkpoint.load(registry.download(champion)).encoder.state_dict()
    assert all(torch.equal(best[name], kept[name]) for name in best)


def test_the_alias_moves_for_a_better_model_alone_and_back(
    searched: Search, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first champion has two dimensions of another model's 64; that model beats it, and is not beaten by it."""
    model = checkpoint.load(searched.checkpoints[0])
    poor = checkpoint.load(searched.checkpoints[0]).encoder
    with torch.no_grad():
        for weights in poor.projection.parameters():
            weights[2:] = 0
    checkpoint.save(here / "poor", poor, model.config, info={"fingerprint": model.info["fingerprint"]})
    name = ["--model-name", "moves"]

    assert promote.main([str(here / "poor"), *name]) == 0
    assert promote.main([searched.checkpoints[0], *name]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"moves@champion is version 2 now: it beats moves@1: Recall@1 0\.\d+ against 0\.\d+, OPIS .*, score .* "
        r"on 4 val classes that neither was trained on",
        said,
    )

    assert promote.main([str(here / "poor"), *name]) == 0
    assert "moves@champion stays version 2: it does not beat moves@2: Recall@1 0." in capsys.readouterr().out
    assert promote.main(["models:/moves/3"]) == 0
    assert "moves@champion stays version 2: it does not beat moves@2" in capsys.readouterr().out
    assert last_of("moves") == 3, "a registered version is not registered again"

    assert promote.main(["models:/moves/3", "--promote", "always"]) == 0
    assert "moves@champion is version 3 now: --promote always" in capsys.readouterr().out
    assert promote.main(["models:/moves@champion"]) == 0
    assert "it is the champion already" in capsys.readouterr().out

    for now, left in ((2, 3), (1, 2)):
        assert promote.main(["--rollback", *name]) == 0
        assert f"moves@champion is version {now} again; it was version {left}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        promote.main(["--rollback", *name])
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: moves@1 is champion and no version that is still there was")


def test_what_cannot_be_compared_is_registered_but_not_promoted(
    searched: Search, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoint.load(searched.checkpoints[0])
    config = model.config.replace(**{"data.split_seed": 7})
    other = {"fingerprint": datasets.load(config.data).fingerprint}
    checkpoint.save(here / "other", model.encoder, config, info=other)
    checkpoint.save(here / "changed", model.encoder, model.config, info={"fingerprint": "0" * 64})
    assert promote.main([searched.run_id]) == 0
    assert "digits@champion is version 1 now: there was no champion" in capsys.readouterr().out

    assert promote.main([str(here / "other"), "--model-name", "digits"]) == 0
    said = capsys.readouterr().out
    assert "registered digits version 2" in said
    assert "digits@champion stays version 1: it cannot be compared with digits@1: digits@1 was trained on an" in said
    assert "--promote always moves the alias all the same" in said
    assert registry.find("models:/digits/1") == registry.champion("digits")

    with pytest.raises(SystemExit) as stop:
        promote.main([str(here / "changed"), "--model-name", "digits"])
    assert stop.value.code == 1
    assert re.search(r"error: the data have changed since .* what is test now may have", capsys.readouterr().err)
    assert last_of("digits") == 2


def test_in_a_job_nothing_is_left_where_ray_throws_it_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for words, needs_storage in ((["--rollback"], False), (["x", "--retrain", "0.5"], True)):
        with pytest.raises(SystemExit) as stop:
            promote.main(words)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert "MLFLOW_TRACKING_URI in the job's environment" in error
        assert ("--storage with" in error) == needs_storage


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name the model: a run id of MLflow"),
        (["--rollback", "models:/digits/1"], "--rollback takes no model"),
        (["x", "--tolerance", "2"], "tolerance: 2 is no difference in Recall@1"),
        (["x", "--retrain", "1"], "retrain: 1 is no share of the val classes"),
        (["x", "--retrain", "0.5", "--baseline", "y"], "--baseline does not go with --retrain"),
        (["x", "--promote", "perhaps"], "perhaps"),
        (["x", "--model-name", "a:b"], "model-name: 'a:b' is no name of a registered model"),
        (["x", "--promot", "never"], "unknown option '--promot'"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        promote.main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_is_no_model_is_refused_with_the_valid_forms(
    searched: Search, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "empty").mkdir()
    with mlflow.start_run() as run:
        pass
    for named, message in (
        ("nowhere", "there is no 'nowhere'; valid: a run id of MLflow"),
        ("empty", "empty holds no checkpoint that is whole"),
        ("0" * 32, f"the MLflow store has no run {'0' * 32}"),
        (run.info.run_id, "(of another program) has no checkpoint: it, or the search"),
        ("models:/digits/99", "models:/digits/99 is not in the MLflow registry"),
        ("models:/digits", "names no registered model; valid: models:/NAME@ALIAS"),
    ):
        with pytest.raises(SystemExit) as stop:
            promote.main([named])
        assert stop.value.code == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_tracking_server_that_is_away_is_said_in_one_line_without_its_password(
    here: Path, monkeypatch: pytest.MonkeyPatch, mlflow_store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    try:
        with pytest.raises(SystemExit):
            promote.main(["--rollback"])
    finally:
        mlflow.set_tracking_uri(mlflow_store)
    error = capsys.readouterr().err
    assert "MLflow at http://127.0.0.1:9: does not answer" in error
    assert "secret" not in error


def test_a_loss_from_outside_is_not_imported_because_a_checkpoint_names_it(
    searched: Search, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoint.load(searched.checkpoints[0])
    config = model.config.replace(**{"loss.name": "os.path:Evil"})
    checkpoint.save(here / "outside", model.encoder, config, info=model.info)
    with pytest.raises(SystemExit):
        promote.main([str(here / "outside"), "--retrain", "0.5"])
    assert "its loss os.path:Evil comes from outside" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "share", "message"),
    [
        ({}, 0.1, "of 2 val classes, 2 of which must stay to set thresholds, a share of 0.1 is none"),
        ({"data.val_fraction": 0.4}, 1.5, "1.5 is no share of the val classes"),
        ({"data.val_fraction": 0.4, "evaluate.far_min": 1e-6}, 0.5, "with 0.5 of the val classes in train, evaluate.f"),
    ],
)
def test_a_last_training_without_classes_for_it_is_refused(
    changes: dict[str, object], share: float, message: str
) -> None:
    from dml import recipes

    with pytest.raises(ValueError, match=re.escape(message)):
        retrain.changed(recipes.digits().replace(**changes), share)


@pytest.mark.slow
def test_a_search_that_ends_with_a_last_training_on_most_of_val(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--trials", "2", "--name", "last", "--model-name", "last", "--retrain", "0.5"]
    assert search.main([*DIGITS, *words]) == 0
    said = capsys.readouterr().out
    assert "training the winner once more, with 50% of the val classes in train" in said
    left = left_by("last")
    champion = registry.champion("last")
    assert champion is not None
    model = checkpoint.load(registry.download(champion))
    assert model.config.data.train_on_val == 0.5
    searched = checkpoint.load(left.checkpoints[0]).config.data
    before, after = datasets.load(searched), datasets.load(model.config.data)
    assert len(after.train.classes) == len(before.train.classes) + 2
    points = json.loads((registry.download(champion) / registry.OPERATING_POINTS).read_text())
    images, labels = len(after.val), after.val.labels_N
    negatives = sum(int(labels[i] != labels[j]) for i in range(images) for j in range(i))
    assert points[0]["negatives"] == negatives, "thresholds are set on the classes that are left"
    run = MlflowClient().get_run(champion.run_id)
    assert (run.data.tags["kind"], run.data.tags["mlflow.parentRunId"]) == ("retrained", left.run_id)

    (listed,) = (here / "runs" / "ray").glob("last-retrained-winner-*/checkpoint_manager_snapshot.json")
    listed.write_bytes(listed.read_bytes()[:-9])  # as a driver leaves it that is killed while Ray Train writes it
    place = retrain.Place("last", Resources(), str(here / "runs" / "ray"), Store.open(), left.run_id)
    again = retrain.run(model.config, "winner", place)
    assert (again.run_id, again.metrics["best/score"]) == (champion.run_id, model.info["report"]["best/score"])
    assert checkpoint.load(again.checkpoint).info == model.info, "what has ended is not trained again"

    # The model of the search and the retrained one meet on the two classes that neither was trained on.
    assert promote.main([left.trials[1], "--model-name", "last"]) == 0
    assert re.search(r"it (beats|does not beat) last@1: .* on 2 val classes", capsys.readouterr().out)


@pytest.mark.slow
def test_any_runs_settings_are_trained_again_on_most_of_val(
    searched: Search, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trial without TCM is its own baseline: one training."""
    assert promote.main([searched.trials[0], "--model-name", "again", "--retrain", "0.5"]) == 0
    assert "50% of the val classes joined train" in capsys.readouterr().out
    champion = registry.champion("again")
    assert champion is not None
    model = checkpoint.load(registry.download(champion))
    assert model.config.data.train_on_val == 0.5
    assert champion.run_id not in searched.trials.values()

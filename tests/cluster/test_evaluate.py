"""The evaluation program, on a model, on files of embeddings, on labelled pairs; in this process and over ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluster import evaluate, registry
from cluster.tracking import Store
from dml import checkpoint, recipes
from dml import evaluate as measuring
from dml.data import datasets

CONFIG = recipes.digits("short")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_store: str) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: object) -> dict:
    assert evaluate.main([*map(str, words), "--out", "out"]) == 0
    return json.loads(Path("out/metrics.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*map(str, words), "--out", "out"])
    assert stop.value.code
    assert not Path("out").exists(), "nothing is left of a run that failed"
    return capsys.readouterr().err


def test_a_checkpoint_on_its_test_classes(here: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run("--model", model, "--save-embeddings")
    splits = datasets.load(CONFIG.data)
    device = torch.device("cpu")
    expected = measuring.evaluate(checkpoint.load(model).encoder, splits.test, CONFIG, device=device, prefix="test")
    for name in ("test/recall@1", "test/opis", "test/mean_utility"):
        assert found["metrics"][name] == pytest.approx(expected[name], rel=1e-6)
    assert found["title"] == "untrained on digits test"
    assert found["calibrated_on"] == "val classes", "thresholds are set on val and put to the test"
    assert [each["far_target"] for each in found["transfer"]] == [0.1, 0.01, 0.001]
    figures = {path.stem for path in Path("out/figures").iterdir()}
    assert figures == {"utility", "error_rates", "distances", "class_far", "spectrum", "neighbours", "map"}
    said = capsys.readouterr().out
    assert "Recall@1" in said
    assert f"{found['metrics']['test/recall@1']:.4f}" in said
    with np.load("out/embeddings.npz") as file:
        assert file["embeddings"].shape == (len(splits.test), CONFIG.encoder.dim)


def test_a_registered_model_brings_its_thresholds(here: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONETHRESHOLD_CACHE", str(here / "cache"))
    run_id = Store.open().start("evaluated", params={}, tags={}).run_id
    point = {"far_target": 0.05, "threshold": 0.9, "far": 0.05, "frr": 0.1, "negatives": 10, "positives": 10}
    version = registry.register(model, run_id=run_id, operating_points=[point], metrics={}, name="evaluated")
    found = run("--model", f"models:/evaluated/{version.version}", "--no-figures", "--track")
    assert [(each["far_target"], each["threshold"]) for each in found["transfer"]] == [(0.05, 0.9)]
    assert not Path("out/figures").exists()
    import mlflow

    (tracked,) = mlflow.search_runs(
        search_all_experiments=True,
        filter_string="tags.kind = 'evaluate' and params.title LIKE 'evaluated@%'",
        output_format="list",
    )
    assert tracked.data.metrics["test/recall_at_1"] == found["metrics"]["test/recall@1"]


def test_a_file_of_embeddings_with_thresholds_of_another(here: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(30), 6)
    rows = rng.standard_normal((30, 8))[labels] + 0.5 * rng.standard_normal((180, 8))
    np.savez("known.npz", embeddings=rows[:90], labels=labels[:90])
    np.savez("new.npz", embeddings=rows[90:], labels=np.array([f"shop {c}" for c in labels[90:]]))
    found = run("--embeddings", "new.npz", "--calibration", "known.npz", "--distance", "cosine", "--far", 0.1, 0.05)
    assert [each["far_target"] for each in found["transfer"]] == [0.1, 0.05]
    assert found["distance"] == "cosine"
    assert found["transfer"][0]["worst_far"][0]["name"].startswith("shop ")


def test_labelled_pairs_of_image_files(here: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = datasets.load(CONFIG.data)
    rows = np.arange(0, 60)
    for row, image in zip(rows, splits.test.images(rows), strict=True):
        Image.fromarray(image[0].numpy()).save(f"{row}.png")
    labels = splits.test.labels_N[rows]
    lines = [f"{i}.png,{j}.png,{int(labels[i] == labels[j])}" for i in rows for j in rows if i < j]
    Path("pairs.csv").write_text("\n".join(["a,b,same", *lines]))
    found = run("--model", model, "--pairs", "pairs.csv", "--far", 0.1)
    assert found["pairs"] == len(lines)
    assert 0.5 < found["metrics"]["pairs/auc"] < 1
    assert {path.stem for path in Path("out/figures").iterdir()} == {"error_rates", "distances"}
    Path("9.png").unlink()
    Path("out").rename("before")
    assert "there is no such image: " in refused(capsys, "--model", model, "--pairs", "pairs.csv")


def test_what_does_not_go_together_is_said_at_once(here: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give one of --model" in refused(capsys)
    assert "give one of --model" in refused(capsys, "--model", model, "--embeddings", "x.npz")
    assert "--data, --root and --split go with --model" in refused(capsys, "--embeddings", "x.npz", "--split", "val")
    assert "far: 2 is no false accept rate" in refused(capsys, "--model", model, "--far", 2)
    assert "unknown option '--modle'" in refused(capsys, "--modle", model)
    assert "unknown dataset 'birds'; valid: glyphs, digits, image_folder" in refused(
        capsys, "--model", model, "--data", "birds"
    )
    assert "needs --root" in refused(capsys, "--model", model, "--data", "image_folder")
    assert "is not in the MLflow registry" in refused(capsys, "--model", "models:/nobody@champion")
    assert "there is no such file" in refused(capsys, "--embeddings", "absent.npz")
    assert "absent.csv: No such file or directory" in refused(capsys, "--model", model, "--pairs", "absent.csv")
    Path("full").mkdir()
    Path("full/note.txt").write_text("mine")
    with pytest.raises(SystemExit):
        evaluate.main(["--model", str(model), "--out", "full"])
    assert "exists and is not empty" in capsys.readouterr().err
    assert Path("full/note.txt").read_text() == "mine"


@pytest.mark.slow
def test_two_ranks_find_what_one_process_finds(here: Path, model: Path, ray_local: None) -> None:
    alone = run("--model", model, "--skip", "clustering", "classification", "--no-figures")
    Path("out").rename("alone")
    both = run("--model", model, "--skip", "clustering", "classification", "--no-figures", "--workers", 2)
    assert both["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)
    assert both["transfer"][0]["threshold"] == pytest.approx(alone["transfer"][0]["threshold"], abs=1e-4)

"""`python -m serve.calibrate`: from a CSV of labelled pairs to new thresholds of a registered model, and back."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster import registry
from dml.metrics.labelled_pairs import calibrate_labelled, read_pairs
from serve import api, calibrate, model
from serve.calibrations import Calibrations
from tests.serve.pictures import Held, noise, offline, write_checkpoint
from tests.serve.server import running

CLASSES, EACH = 6, 5


def write_pairs(folder: Path) -> Path:
    """Images of six noisy patterns, and all pairs of them, labelled."""
    folder.mkdir()
    draws = np.random.default_rng(0)
    patterns = draws.integers(0, 256, (CLASSES, 32, 32))
    names = []
    for label in range(CLASSES):
        for number in range(EACH):
            pixels = np.clip(patterns[label] + draws.normal(0, 40, (32, 32)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{label}-{number}.png")
            names.append(f"{label}-{number}.png")
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "b", "same"])
        for i, one in enumerate(names):
            writer.writerows([one, other, int(one[0] == other[0])] for other in names[i + 1 :])
    return folder / "pairs.csv"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "images")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "mine", seed=1)


def test_new_points_of_a_registered_version_and_back(
    pairs: Path,
    folder: Path,
    mlflow_store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import mlflow

    monkeypatch.setenv("ONETHRESHOLD_CACHE", str(tmp_path / "cache"))
    with mlflow.start_run() as run:
        pass
    old = {"far_target": 0.1, "threshold": 0.001, "far": 0.1, "frr": 0.0, "negatives": 9, "positives": 9}
    version = registry.register(folder, run_id=run.info.run_id, operating_points=[old], metrics={}, name="recalibrated")
    registry.promote(version)
    source = model.source("models:/recalibrated@champion")
    assert isinstance(source, model.Follower)
    source.look()

    words = ["--model", "models:/recalibrated@champion"]
    assert calibrate.main(["--pairs", str(pairs), *words]) == 0
    shown = capsys.readouterr()
    positives, negatives = CLASSES * EACH * (EACH - 1) // 2, EACH**2 * CLASSES * (CLASSES - 1) // 2
    source.look()
    assert source.current is not None
    used = source.current.calibration
    assert used is not None
    assert used.source == f"pairs.csv: {positives} positives, {negatives} negatives"

    labelled = read_pairs(pairs)
    names = sorted({*labelled.a, *labelled.b})
    embeddings = offline(folder, [(pairs.parent / name).read_bytes() for name in names])
    expected = calibrate_labelled(labelled, names, embeddings, far=[0.01, 0.1])
    assert [point.threshold for point in used.points] == pytest.approx([p.threshold for p in expected], abs=1e-4)
    assert [point.far_interval for point in used.points] == [
        pytest.approx(point.far_interval, abs=0.01) for point in expected
    ]
    assert used.histograms is not None
    assert (sum(used.histograms.positives), sum(used.histograms.negatives)) == (positives, negatives)

    assert re.search(r"0\.1 +0\.0010 +0 \(.*\) +1 \(.*\)", shown.out), "what the old threshold does to these pairs"
    assert "FAR 0.001 cannot be reached" in shown.err
    assert "the threshold for FAR 0.01 rests on fewer than 10 false accepts; about 1,000 negatives" in shown.err
    assert "back: python -m serve.calibrate revert registered --model models:/recalibrated@champion" in shown.out
    assert f"recalibrated@1 is decided by calibration {used.id} now" in shown.out

    assert calibrate.main(["list", *words]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"* {used.id}")
    assert "registered" in last
    assert calibrate.main(["revert", "registered", *words]) == 0
    source.look()
    assert source.current.calibration is not None
    assert source.current.calibration.points[0].threshold == 0.001
    assert calibrate.main(["revert", used.id[:6], *words]) == 0
    source.look()
    assert source.current.calibration == used


def test_a_folder_needs_no_registry_and_a_dry_run_changes_nothing(
    pairs: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(folder), "--far", "0.1"]
    assert calibrate.main(["--pairs", str(pairs), *words, "--dry-run"]) == 0
    assert "the model has no operating points yet" in capsys.readouterr().out
    assert Calibrations.beside(folder).current() is None
    assert calibrate.main(["--pairs", str(pairs), *words]) == 0
    used = Calibrations.beside(folder).current()
    assert used is not None
    assert [point.far_target for point in used.points] == [0.1]
    assert calibrate.main(["--pairs", str(pairs), "--model", str(folder), "--far", "0.2"]) == 0
    assert "requests that ask for FAR 0.1 will be refused" in capsys.readouterr().err


def test_a_running_service_may_embed_the_images(pairs: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert calibrate.main(["--pairs", str(pairs), "--model", str(folder), "--far", "0.1", "--dry-run"]) == 0
    here = capsys.readouterr().out
    embedder = model.CheckpointEmbedder(folder, "onethreshold", "mine", model.Execution(batch=8))
    with running(api.build(Held(embedder))) as url:
        words = ["--pairs", str(pairs), "--model", str(folder), "--far", "0.1", "--dry-run", "--url", url]
        assert calibrate.main(words) == 0
        assert capsys.readouterr().out == here
        other = write_checkpoint(folder.parent / "other", seed=2)
        words[3] = str(other)
        with pytest.raises(SystemExit) as stopped:
            calibrate.main(words)
    assert stopped.value.code == 1
    assert "serves onethreshold@mine, not onethreshold@other" in capsys.readouterr().err


def test_an_image_that_a_service_cannot_read_is_named_by_its_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(34):
        (tmp_path / f"{number:02}.png").write_bytes(noise(number))
    (tmp_path / "99.png").write_bytes(b"text")  # the last of them, in the second request
    rows = [f"00.png,{number:02}.png,{number % 2}\n" for number in [*range(1, 34), 99]]
    (tmp_path / "pairs.csv").write_text("a,b,same\n" + "".join(rows))
    embedder = model.CheckpointEmbedder(folder, "onethreshold", "mine", model.Execution(batch=8))
    words = ["--pairs", str(tmp_path / "pairs.csv"), "--model", str(folder)]
    with running(api.build(Held(embedder))) as url, pytest.raises(SystemExit) as stopped:
        calibrate.main([*words, "--url", url])
    assert stopped.value.code == 1
    assert f"error: {tmp_path / '99.png'} is unreadable" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        calibrate.main([*words, "--url", "http://127.0.0.1:80O0"])
    assert "url: 'http://127.0.0.1:80O0' is no address" in str(stopped.value.code)


@pytest.mark.parametrize(
    ("rows", "words", "status", "says"),
    [
        (None, [], 2, "pairs: name the CSV file"),
        (None, ["--pairs", "missing.csv"], 2, "there is no file 'missing.csv'"),
        ("0-0.png,0-1.png,1\n0-0.png,gone.png,0\n", [], 1, "gone.png: No such file"),
        ("0-0.png,0-1.png,1\n0-0.png,pairs.csv,0\n", [], 1, "pairs.csv: "),
        ("0-0.png,0-1.png,1\n", [], 1, "none of 1 is labelled as not the same"),
        ("0-0.png,0-1.png,1\n0-0.png,1-0.png,0\n", ["--far", "0.1"], 1, "too few negatives for any of the targets"),
        ("0-0.png,0-1.png,maybe\n", [], 1, "row 2: same is 'maybe'; valid: 1, true"),
        (None, ["--pairs", __file__, "--far", "1.5"], 2, "between 0 and 1, got 1.5"),
        (None, ["--pairs", __file__, "--model", "nowhere"], 2, "there is no folder 'nowhere'"),
        (None, ["revert"], 2, "revert takes the id"),
        (None, ["revert", "abc"], 1, "no calibration 'abc'; valid: none is stored"),
        (None, ["list", "abc"], 2, "list takes no id"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_words_and_changes_nothing(
    pairs: Path,
    folder: Path,
    rows: str | None,
    words: list[str],
    status: int,
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [] if "--model" in words else ["--model", str(folder)]
    if rows is not None:
        other = pairs.with_name("other.csv")
        other.write_text(f"a,b,same\n{rows}")
        given += ["--pairs", str(other)]
    with pytest.raises(SystemExit) as stopped:
        calibrate.main([*words, *given])
    assert stopped.value.code == status
    assert says in capsys.readouterr().err
    assert Calibrations.beside(folder).current() is None

"""Bulk embedding over Ray Data: equal to offline embedding, resumed by shard, and not stopped by bad files."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cluster import embed, embed_shards, embedding_table
from dml import checkpoint, encoders, evaluate, recipes
from dml.data import datasets
from dml.data.images import ImageError
from dml.data.imageset import DataError

CONFIG = recipes.digits("short")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Thirty images in two class folders and beside them, and what is no image."""
    root = tmp_path / "photos"
    rng = np.random.default_rng(0)
    for number in range(30):
        path = root / ("cats", "dogs/old", "")[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24), dtype=np.uint8)).save(path)
    (root / "cats" / "note.txt").write_text("not an image, and not said to be one")
    (root / "cats" / "torn.png").write_bytes((root / "cats" / "00.png").read_bytes()[:200])
    (root / "dogs" / "empty.jpg").write_bytes(b"")
    Path(os.fsdecode(os.fsencode(root / "cats") + b"/caf\xe9.png")).write_bytes(b"its name is Latin-1")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "a.png").write_bytes(b"passed over")
    return root


def run(*words: object) -> None:
    assert embed.main([*map(str, words), "--cpus-per-worker", "1", "--workers", "1"]) == 0


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        embed.main([*map(str, words)])
    assert stop.value.code
    return capsys.readouterr().err


def test_a_dataset_is_embedded_as_offline(model: Path, tmp_path: Path, ray_local: None) -> None:
    out = tmp_path / "emb.parquet"
    run("--model", model, "--data", "digits", "--out", out, "--shard", 1000)
    table = pq.read_table(out)
    whole = datasets.whole(CONFIG.data)
    expected = evaluate.embed(checkpoint.load(model).encoder, whole, CONFIG, device=torch.device("cpu")).numpy()
    got = np.stack(table["embedding"].to_pylist())
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert table["label"].to_pylist() == [whole.classes[label] for label in whole.labels_N]
    assert table["id"][1796].as_py() == "digits/001796"
    made = embedding_table.made(out)
    assert made is not None
    assert (made.model, made.dim, made.images) == ("onethreshold@untrained", CONFIG.encoder.dim, 1797)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emb.parquet"], "nothing is left beside it"


def test_a_folder_with_bad_files_is_embedded_but_for_these(
    model: Path, photos: Path, tmp_path: Path, ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run("--model", model, "--data", photos, "--out", out, "--shard", 10, "--batch", 4)
    rows = {
        name: (row, other.get("label"))
        for ids, rows_BD, others in embedding_table.read(out, 7)
        for name, row, other in zip(ids, rows_BD, others, strict=True)
    }
    images = {path.relative_to(photos).as_posix() for path in photos.rglob("[0-9]*.png")}
    assert rows.keys() == images
    assert {rows[name][1] for name in images if "/" in name} == {"cats", "dogs"}
    assert {rows[name][1] for name in images if "/" not in name} == {None}
    loaded = checkpoint.load(model)
    from dml.data import images as reading

    for name in sorted(images)[:5]:
        pixels = reading.to_input([reading.decode(photos / name, 1)], CONFIG.data)
        with torch.inference_mode():
            np.testing.assert_allclose(rows[name][0], loaded.encoder(pixels)[0].numpy(), atol=1e-5)
    with (out / "bad.csv").open(newline="") as file:
        header, *bad = csv.reader(file)
    assert header == ["file", "why"]
    assert {name for name, _ in bad} == {r"cats/caf\xe9.png", "cats/torn.png", "dogs/empty.jpg"}
    assert all(why for _, why in bad)
    assert dict(bad)[r"cats/caf\xe9.png"] == "its name is not UTF-8"
    said = capsys.readouterr()
    assert "30 of 32 images embedded by onethreshold@untrained" in said.out
    assert "3 files are no readable images" in said.err


def test_it_goes_on_where_it_was_stopped(model: Path, photos: Path, tmp_path: Path, ray_local: None) -> None:
    out = tmp_path / "out"
    run("--model", model, "--data", photos, "--out", out, "--shard", 10)
    shards = sorted(out.glob("shard-*.parquet"))
    assert len(shards) == 4
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in shards}
    shards[1].unlink()
    (out / ".shard-000001.parquet.new").write_bytes(b"half a shard")
    run("--model", model, "--data", photos, "--out", out, "--shard", 10)
    for path in shards:
        written, content = before[path.name]
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == written) == (path != shards[1]), "the others were not made again"


def test_another_model_or_other_data_is_refused(
    model: Path, photos: Path, tmp_path: Path, ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    same = ("--data", photos, "--out", out)
    run("--model", model, *same)
    torch.manual_seed(1)
    other = tmp_path / "other" / "untrained"
    encoder = encoders.build(CONFIG.encoder, channels=1, image_size=CONFIG.data.image_size)
    checkpoint.save(other, encoder, CONFIG, info={"epoch": 0})
    assert "holds shards of another run (weights " in refused(capsys, "--model", other, *same)
    (photos / "cats" / "99.png").write_bytes((photos / "cats" / "00.png").read_bytes())
    assert "holds shards of another run (data " in refused(capsys, "--model", model, *same)


def test_what_cannot_be_is_said_at_once(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = ("--out", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "there.parquet").write_bytes(b"mine")
    assert "out: name a file" in refused(capsys, "--model", model)
    assert "unknown dataset" in refused(capsys, "--model", model, "--data", "digit", *out)
    assert "no image under" in refused(capsys, "--model", model, "--data", tmp_path / "empty", *out)
    assert "shard: 0 must be above 0" in refused(capsys, "--model", model, "--shard", 0, *out)
    assert "holds something else" in refused(capsys, "--model", model, "--data", "digits", "--out", tmp_path / "full")
    assert "is there already" in refused(
        capsys, "--model", model, "--data", "digits", "--out", tmp_path / "there.parquet"
    )
    assert "is not in the MLflow registry" in refused(capsys, "--model", "models:/nobody@champion", *out)
    under = ("--out", tmp_path / "there.parquet" / "out")
    assert f"error: {under[1]}: Not a directory\n" == refused(capsys, "--model", model, "--data", "digits", *under)
    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    said = refused(capsys, "--model", "models:/nobody@champion", *out)
    mlflow.set_tracking_uri(before)
    assert said == "error: MLflow at http://127.0.0.1:9: does not answer (Connection refused)\n"
    assert not (tmp_path / "out").exists()


def test_a_file_that_went_is_a_bad_one_and_a_storage_that_fails_is_none(photos: Path) -> None:
    root = str(photos)
    with pytest.raises(ImageError, match="no such file or directory"):
        embed_shards.read(photos / "cats" / "98.png", root)
    (photos / "dogs" / "broken.png").symlink_to("/proc/self/mem")  # a read of it is an I/O error
    with pytest.raises(DataError, match=r"dogs/broken.png cannot be read on node .*: input/output error; what is"):
        embed_shards.read(photos / "dogs" / "broken.png", root)
    shutil.rmtree(photos)
    for _ in ("gone", "not mounted"):
        with pytest.raises(DataError, match="no such file or directory; what is embedded stays"):
            embed_shards.read(photos / "cats" / "00.png", root)
        photos.mkdir(exist_ok=True)


def test_a_shard_whose_storage_fails_is_not_done(
    model: Path, photos: Path, tmp_path: Path, ray_local: None, capfd: pytest.CaptureFixture[str]
) -> None:
    (photos / "dogs" / "broken.png").symlink_to("/proc/self/mem")
    with pytest.raises(SystemExit) as stop:
        run("--model", model, "--data", photos, "--out", tmp_path / "out")
    assert stop.value.code == 1
    assert "broken.png cannot be read on node" in capfd.readouterr().err.splitlines()[-1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(model: Path, photos: Path, tmp_path: Path) -> None:
    """kill -9 of the driver between two shards; its Ray ends with it."""
    out = tmp_path / "out"
    words = ["--model", str(model), "--data", str(photos), "--out", str(out), "--shard", "2", "--workers", "1"]
    command = [sys.executable, "-m", "cluster.embed", *words]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    driver = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(out.glob("shard-*.parquet"))) < 3:
        assert time.monotonic() < deadline
        assert driver.poll() is None or len(list(out.glob("shard-*.parquet"))) == 16
        time.sleep(0.005)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.parquet")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "30 of 32 images" in done.stdout
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.parquet")}
    assert len(after) == 16
    assert sum(after[name] == kept[name] for name in kept) >= len(kept) - 1, "a shard was perhaps being renamed"
    assert embedding_table.count(out) == 30

"""The registry: a checkpoint goes in as a version, an alias says which one is served, and it comes out bit by bit."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster import registry
from dml import checkpoint, encoders
from dml.config import Config, DataConfig, EncoderConfig
from tests.cluster.mlflow_server import MLflowServer

POINTS = [{"far": 0.01, "threshold": 0.93}, {"far": 0.1, "threshold": 1.1}]
CONFIG = Config(data=DataConfig(image_size=16), encoder=EncoderConfig(dim=8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    encoder = encoders.build(CONFIG.encoder, channels=1, image_size=16)
    checkpoint.save(tmp_path / "checkpoint", encoder, CONFIG, info={"epoch": 3})
    return tmp_path / "checkpoint"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONETHRESHOLD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run_id(mlflow_store: str) -> str:
    import mlflow

    mlflow.set_tracking_uri(mlflow_store)  # a test before may have had another
    with mlflow.start_run() as run:
        return run.info.run_id


def register(folder: Path, run_id: str, name: str) -> registry.ModelVersion:
    return registry.register(folder, run_id=run_id, operating_points=POINTS, metrics={"recall@1": 0.9}, name=name)


def same_embeddings(one: torch.nn.Module, other: torch.nn.Module, batch: int) -> bool:
    images = torch.randn(batch, 1, 16, 16, generator=torch.Generator().manual_seed(batch))
    with torch.inference_mode():
        return torch.allclose(one(images), other(images), atol=1e-6)


def test_there_is_no_champion_before_one_is_promoted(folder: Path, run_id: str) -> None:
    assert registry.champion("unpromoted") is None
    register(folder, run_id, "unpromoted")
    assert registry.champion("unpromoted") is None
    assert registry.find("models:/unpromoted/1") is not None
    assert registry.find("models:/unpromoted/2") is None


@pytest.mark.parametrize("name", ["a/b", "a:b", "..", ".", "", " "])
def test_a_name_that_mlflow_would_refuse_is_refused_at_once(name: str, mlflow_store: str) -> None:
    from mlflow import MlflowClient, MlflowException

    with pytest.raises(MlflowException):
        MlflowClient().create_registered_model(name)
    with pytest.raises(ValueError, match="is no name of a registered model; valid: any without '/' and ':'"):
        registry.check_name(name)
    registry.check_name("shop.faces_2 old-style")


def test_the_alias_moves_from_version_to_version(folder: Path, run_id: str) -> None:
    first, second = register(folder, run_id, "moving"), register(folder, run_id, "moving")
    assert (first.version, second.version) == (1, 2)
    assert (first.label, first.run_id) == ("moving@1", run_id)
    for version in (first, second, first):
        registry.promote(version)
        assert registry.champion("moving") == version
    assert registry.champion("moving", alias="challenger") is None


def test_a_rollback_goes_back_champion_by_champion(folder: Path, run_id: str) -> None:
    one, two, three = (register(folder, run_id, "history") for _ in range(3))
    for version in (one, two, two, one, three):
        registry.promote(version)
    assert registry.rollback("history") == (three, one)
    assert registry.rollback("history") == (one, two)
    assert registry.champion("history") == two
    registry.promote(three)
    assert registry.rollback("history") == (three, two), "what was rolled back is forgotten"
    assert registry.rollback("history") == (two, one)
    with pytest.raises(ValueError, match=r"history@1 is champion and no version .* before it; .*--promote always"):
        registry.rollback("history")
    assert registry.champion("history") == one


def test_a_rollback_passes_over_versions_that_are_gone_and_aliases_that_a_person_moved(
    folder: Path, run_id: str
) -> None:
    import mlflow

    client = mlflow.MlflowClient()
    one, two, three, four = (register(folder, run_id, "gaps") for _ in range(4))
    for version in (one, two, three):
        registry.promote(version)
    client.delete_model_version("gaps", "2")
    client.set_registered_model_alias("gaps", "champion", "4")
    assert registry.rollback("gaps") == (four, one)


def test_there_is_nothing_to_roll_back_without_a_champion(folder: Path, run_id: str) -> None:
    register(folder, run_id, "headless")
    for name in ("headless", "nobody"):
        with pytest.raises(ValueError, match=f"{name} has no champion in the MLflow registry"):
            registry.rollback(name)


def test_a_version_carries_its_card_tags_and_evaluation(folder: Path, run_id: str) -> None:
    import mlflow

    card = "# A card\n" + "x" * 2 * registry.DESCRIPTION
    version = registry.register(
        folder,
        run_id=run_id,
        operating_points=POINTS,
        metrics={},
        name="documented",
        tags={"data.fingerprint": "abc"},
        card=card,
        evaluation={"metrics": {"test/opis": 0.1}},
    )
    stored = mlflow.MlflowClient().get_model_version("documented", "1")
    assert stored.description == card[: registry.DESCRIPTION]
    assert stored.tags["data.fingerprint"] == "abc"
    registry.tag(version, {"promotion": "why"})
    assert mlflow.MlflowClient().get_model_version("documented", "1").tags["promotion"] == "why"
    local = registry.download(version)
    assert (local / registry.MODEL_CARD).read_text() == card
    assert json.loads((local / registry.EVALUATION).read_text()) == {"metrics": {"test/opis": 0.1}}
    assert checkpoint.load(local).config == CONFIG, "documents beside the checkpoint do not make it another"


def test_a_version_downloads_as_the_checkpoint_that_was_registered(folder: Path, run_id: str) -> None:
    version = register(folder, run_id, "downloaded")
    local = registry.download(version)
    assert json.loads((local / "operating_points.json").read_text()) == POINTS
    for name in checkpoint.FILES:
        assert (local / name).read_bytes() == (folder / name).read_bytes()
    assert checkpoint.load(local).info == {"epoch": 3}
    assert registry.download(version) == local, "fetched once"


def test_others_load_the_mlflow_flavour_with_any_batch_size_and_without_pickle(folder: Path, run_id: str) -> None:
    import mlflow.artifacts
    import mlflow.pytorch

    version = register(folder, run_id, "flavour")
    files = Path(mlflow.artifacts.download_artifacts(version.source))
    assert not list(files.rglob("*.pth"))
    with zipfile.ZipFile(files / "data" / "model.pt2") as archive:
        weights = [name for name in archive.namelist() if "/data/weights/weight_" in name]
        raw = {tensor.numpy().tobytes() for tensor in load_file(folder / "encoder.safetensors").values()}
        assert weights
        assert all(archive.read(name) in raw for name in weights), "the tensors' own bytes, not pickles"
    program = mlflow.pytorch.load_model(f"models:/flavour/{version.version}")
    for batch in (1, 2, 5):
        assert same_embeddings(program, checkpoint.load(folder).encoder, batch)


def test_the_version_carries_its_metrics_and_leaves_the_run_as_it_was(folder: Path, run_id: str) -> None:
    import mlflow

    client = mlflow.MlflowClient()
    before = client.get_run(run_id).info
    register(folder, run_id, "tagged")
    assert client.get_model_version("tagged", "1").tags["recall_at_1"] == "0.9"
    after = client.get_run(run_id).info
    assert (after.status, after.end_time) == (before.status, before.end_time)
    assert mlflow.active_run() is None


def test_what_is_no_checkpoint_is_not_registered(folder: Path, run_id: str) -> None:
    weights = folder / "encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(checkpoint.CheckpointError, match=r"encoder[.]safetensors is truncated or altered"):
        register(folder, run_id, "truncated")
    assert registry.find("models:/truncated/1") is None


@pytest.mark.parametrize("uri", ["onethreshold", "models:/", "models:/a", "models:/a@", "models:/a/latest", "/a@b"])
def test_a_uri_of_another_form_is_refused_with_the_valid_forms(uri: str) -> None:
    with pytest.raises(ValueError, match="models:/NAME@ALIAS"):
        registry.parse(uri)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real MLflow server on a free port, with its artifacts behind it."""
    running = MLflowServer(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", running.url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    try:
        running.start()
        yield running.url
    finally:
        running.kill()


@pytest.mark.slow
def test_a_tracking_server_works_like_the_database(
    server: str, mlflow_store: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        client = mlflow.MlflowClient(server)
        run = client.create_run(client.create_experiment("remote"))
        assert registry.champion() is None
        version = register(folder, run.info.run_id, "onethreshold")
        registry.promote(version)
        assert registry.champion() == version
        assert same_embeddings(
            checkpoint.load(registry.download(version)).encoder, checkpoint.load(folder).encoder, batch=3
        )
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        with pytest.raises(MlflowException, match=r"127\.0\.0\.1"):
            registry.champion()
    finally:
        mlflow.set_tracking_uri(mlflow_store)


def test_the_cache_remembers_which_version_an_alias_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "models:/remembered@champion"
    version = registry.ModelVersion("remembered", 3, "run", "models:/m-1")
    assert registry.recall(uri) is None
    registry.remember(uri, version)
    assert registry.recall(uri) is None, "its files are not in the cache"
    (tmp_path / "cache" / "models" / "remembered@3-m-1").mkdir(parents=True)
    assert registry.recall(uri) == version
    assert registry.recall("models:/remembered@next") is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://another.store")
    assert registry.recall(uri) is None, "another store's model of this name is another model"

"""The model that is served: loaded from a folder, changed over in one assignment, never lost to trouble elsewhere."""

import logging
import time
from pathlib import Path

import numpy as np
import pytest

from dml import checkpoint
from dml.data.images import ImageError
from serve import batch_size, model
from tests.serve.pictures import MeanColour, noise, offline, write_checkpoint


class Registry:
    """What a registry says and loads, in the test's hands; an exception in place of a version is raised."""

    def __init__(self) -> None:
        self.wanted: int | Exception | None = None
        self.broken: set[int] = set()
        self.loads: list[int] = []

    def find(self) -> int | None:
        if isinstance(self.wanted, Exception):
            raise self.wanted
        return self.wanted

    def load(self, version: int) -> model.Embedder:
        self.loads.append(version)
        if version in self.broken:
            raise checkpoint.CheckpointError(f"version {version} is truncated")
        loaded = MeanColour()
        loaded.version = str(version)
        return loaded


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
def follower(registry: Registry) -> model.Follower[int]:
    return model.Follower(registry.find, registry.load)


def served(follower: model.Follower[int]) -> str | None:
    return follower.current.version if follower.current else None


def test_it_waits_for_a_champion_and_follows_the_alias(registry: Registry, follower: model.Follower[int]) -> None:
    for wanted in (None, 1, 1, 2, 1):
        registry.wanted = wanted
        follower.look()
        assert served(follower) == (str(wanted) if wanted else None)
        assert follower.trouble is None
    assert registry.loads == [1, 2, 1], "a version that is held is not loaded again"


@pytest.mark.parametrize("trouble", ["registry down", "broken version", "alias removed"])
def test_trouble_changes_nothing_for_what_is_loaded(
    registry: Registry, follower: model.Follower[int], trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    registry.wanted = 1
    follower.look()
    registry.broken = {2}
    registry.wanted = {"registry down": ConnectionError("refused"), "broken version": 2}.get(trouble)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            follower.look()
    assert served(follower) == "1"
    logged = [record for record in caplog.records if "goes on serving" in record.message]
    assert len(logged) == (0 if trouble == "alias removed" else 1), "logged once, not at every look"
    registry.wanted = 3
    follower.look()
    assert served(follower) == "3"


def test_trouble_before_the_first_champion_is_told_without_details(
    registry: Registry, follower: model.Follower[int]
) -> None:
    registry.wanted = ConnectionError("postgresql://user:secret@db")
    follower.look()
    assert follower.trouble == "the model registry cannot be reached"
    registry.wanted, registry.broken = 2, {2}
    follower.look()
    assert follower.trouble == "it cannot be loaded"
    registry.broken = set()
    follower.look()
    assert (served(follower), follower.trouble) == ("2", None)


def test_a_start_while_the_registry_is_down_serves_what_was_served_the_last_time(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    follower = model.Follower(registry.find, registry.load, recall=lambda: 1)
    registry.wanted = ConnectionError("refused")
    with caplog.at_level(logging.WARNING):
        follower.look()
        follower.look()
    assert (served(follower), registry.loads) == ("1", [1])
    assert follower.trouble == f"{model.UNREACHABLE}; what is served comes from the cache of the last time"
    assert any("from the cache" in record.message for record in caplog.records)
    registry.wanted = 1
    follower.look()
    assert (served(follower), follower.trouble, registry.loads) == ("1", None, [1])
    registry.wanted = 2
    follower.look()
    assert (served(follower), follower.trouble) == ("2", None)


def test_a_start_with_a_version_that_does_not_load_serves_what_was_served_the_last_time(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    follower = model.Follower(registry.find, registry.load, recall=lambda: 1)
    registry.wanted, registry.broken = 2, {2}
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            follower.look()
            assert served(follower) == "1"
            assert follower.trouble == "it cannot be loaded; what is served comes from the cache of the last time"
    assert registry.loads == [2, 1, 2, 2], "the wanted one is tried again, the recalled one is held"
    assert len([record for record in caplog.records if "is truncated" in record.message]) == 1
    registry.broken = set()
    follower.look()
    assert (served(follower), follower.trouble) == ("2", None)


@pytest.mark.parametrize("wanted", [ConnectionError("refused"), 2])
def test_a_memory_that_cannot_be_read_is_one_more_trouble_and_no_end(
    registry: Registry, wanted: int | Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def recall() -> int:
        raise ValueError("Expecting value: line 1 column 1 (char 0)")

    follower = model.Follower(registry.find, registry.load, recall=recall)
    registry.wanted, registry.broken = wanted, {2}
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            follower.look()
    assert follower.current is None
    assert follower.trouble == ("it cannot be loaded" if wanted == 2 else model.UNREACHABLE)
    assert len(caplog.records) == 2, "each trouble is logged once"
    registry.wanted = 3
    follower.look()
    assert (served(follower), follower.trouble) == ("3", None)


def test_nothing_is_recalled_while_the_registry_answers(registry: Registry) -> None:
    follower = model.Follower(registry.find, registry.load, recall=lambda: 1)
    follower.look()
    assert follower.current is None, "no version has the alias: the cache does not bring one back"


def test_it_looks_in_a_thread_of_its_own(registry: Registry) -> None:
    follower = model.Follower(registry.find, registry.load, poll=0.01)
    follower.start()
    try:
        for wanted in (1, 2):
            registry.wanted = wanted
            deadline = time.monotonic() + 20
            while served(follower) != str(wanted) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert served(follower) == str(wanted)
    finally:
        follower.stop()


def test_a_checkpoint_folder_is_served_under_its_own_name(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "mine", seed=0)
    source = model.source(str(folder))
    assert isinstance(source, model.Follower)
    source.look()
    assert source.current is not None
    assert model.label(source.current) == "onethreshold@mine"
    assert (source.current.dim, source.current.image_size) == (16, 32)


def test_embeddings_do_not_depend_on_the_company(tmp_path: Path) -> None:
    """More images than one forward pass takes, of many shapes, against each alone and against the offline encoder."""
    folder = write_checkpoint(tmp_path / "mine", seed=0)
    embedder = model.CheckpointEmbedder(folder, "mine", "1", model.Execution(batch=8))
    files = [noise(seed, size=(20 + seed, 50 - seed)) for seed in range(2 * embedder.batch + 3)]
    inputs = [embedder.decode(data) for data in files]
    together = embedder.embed(inputs)
    assert together.shape == (len(files), 16)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(together, np.concatenate([embedder.embed([one]) for one in inputs]), atol=1e-5)
    np.testing.assert_allclose(together, offline(folder, files), atol=1e-5)


def test_what_can_never_be_served_is_refused_at_the_start(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "mine", seed=0)
    model.check(str(folder))
    model.check("models:/onethreshold@champion")
    (folder / "config.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"config\.json missing"):
        model.check(str(folder))
    with pytest.raises(ValueError, match="models:/NAME@ALIAS"):
        model.check("models:/onethreshold")
    with pytest.raises(ImageError):
        model.CheckpointEmbedder(write_checkpoint(tmp_path / "other", seed=0), "mine", "1").decode(b"text")


def test_the_batch_is_the_smallest_that_is_nearly_the_fastest() -> None:
    assert batch_size.choose({1: 50, 2: 90, 4: 96, 8: 100, 16: 80}) == 4
    ran: list[int] = []
    rates = batch_size.measure(ran.append, most=20)
    assert list(rates) == [1, 2, 4, 8, 16]
    assert all(ran.count(size) >= 2 for size in rates), "each size is warmed up first"
    assert list(batch_size.measure(ran.append, most=20, seconds=0)) == [1], "bounded in time"


def test_the_figures_of_the_registry_come_with_the_checkpoint(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "mine", seed=0)
    assert model.CheckpointEmbedder(folder, "mine", "1").metrics == {}
    (folder / "evaluation.json").write_text('{"metrics": {"test/opis": 0.25, "test/note": "none"}}')
    assert model.CheckpointEmbedder(folder, "mine", "1").metrics == {"test/opis": 0.25}

"""Where a team's calibrations are kept, beside a folder and with a registered version; how a service takes them up."""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import registry
from serve import model
from serve.calibration import REGISTERED, Calibration
from serve.calibrations import CURRENT, FOLDER, KEPT, TAG, Calibrations
from tests.serve.calibrated import calibration
from tests.serve.pictures import MeanColour, write_checkpoint

MADE = calibration(source="pairs.csv", created=1_800_000_000)
NUMBERS = itertools.count()


def another(shift: float, created: int = 1_800_000_100) -> Calibration:
    points = [vars(replace(point, threshold=point.threshold + shift)) for point in MADE.points]
    return Calibration.of(points, MADE.histograms, f"shifted by {shift:g}", created)


@pytest.fixture
def version(mlflow_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> registry.ModelVersion:
    """A version with one operating point, whose name no other test has."""
    import mlflow

    monkeypatch.setenv("ONETHRESHOLD_CACHE", str(tmp_path / "cache"))
    with mlflow.start_run() as run:
        pass
    return registry.register(
        write_checkpoint(tmp_path / "checkpoint", seed=1),
        run_id=run.info.run_id,
        operating_points=[vars(MADE.points[1])],
        metrics={},
        name=f"calibrated-{next(NUMBERS)}",
    )


@pytest.fixture(params=["folder", "version"])
def calibrations(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Calibrations]:
    if request.param == "version":
        yield Calibrations.of_version(request.getfixturevalue("version"))
        return
    folder = write_checkpoint(tmp_path / "mine", seed=1)
    (folder / registry.OPERATING_POINTS).write_text(f"[{_json(MADE.points[1])}]")
    yield Calibrations.beside(folder)


def _json(point: object) -> str:
    import json

    return json.dumps(vars(point))


def test_json_takes_a_calibration_there_and_back() -> None:
    assert Calibration.of_text(MADE.text) == MADE
    bare = calibration(with_histograms=False)
    assert Calibration.of_text(bare.text) == bare
    for text in ("", "[]", "{}", '{"points": [], "histograms": null, "source": "", "created": 0}'):
        with pytest.raises(ValueError, match="no calibration"):
            Calibration.of_text(text)


def test_the_registered_one_is_in_use_until_another_is_and_again_after_a_revert(calibrations: Calibrations) -> None:
    registered = calibrations.current()
    assert registered is not None
    assert (registered.source, [point.far_target for point in registered.points]) == (REGISTERED, [0.01])
    later = another(0.1)
    for used in (MADE, later):
        calibrations.use(used)
        assert calibrations.current() == used
    assert [each.id for each in calibrations.listed()] == [later.id, MADE.id, registered.id]
    assert calibrations.revert(MADE.id[:5]) == MADE
    assert calibrations.current() == MADE
    assert calibrations.revert(REGISTERED) == registered
    assert calibrations.current() == registered
    assert len(calibrations.listed()) == 3, "what was reverted can be used again"


def test_an_unknown_id_is_refused_with_those_that_there_are(calibrations: Calibrations) -> None:
    calibrations.use(MADE)
    for wanted in ("zzz", "", "current"):
        with pytest.raises(ValueError, match=f"no calibration '{wanted}'; valid: {MADE.id}, registered"):
            calibrations.revert(wanted)
    assert calibrations.current() == MADE


def test_only_so_many_are_kept_and_never_without_the_one_in_use(tmp_path: Path) -> None:
    calibrations = Calibrations.beside(tmp_path)
    assert (calibrations.current(), calibrations.listed()) == (None, [])
    made = [another(number / 1000, created=1000 + number) for number in range(KEPT + 3)]
    for each in made:
        calibrations.use(each)
    assert [each.created for each in calibrations.listed()] == [each.created for each in reversed(made[3:])]
    oldest = another(0.7, created=1)
    calibrations.use(oldest)
    assert calibrations.current() == oldest
    assert len(calibrations.listed()) == KEPT
    with pytest.raises(ValueError, match="registered without operating points"):
        calibrations.revert(REGISTERED)


def test_a_version_carries_its_calibrations_as_tags(version: registry.ModelVersion) -> None:
    Calibrations.of_version(version).use(MADE)
    tags = registry.tags(version)
    assert tags[TAG + CURRENT] == MADE.id
    assert Calibration.of_text(tags[TAG + MADE.id]) == MADE
    assert len(tags[TAG + MADE.id]) < 5000, "MLflow's tags hold 100,000 characters"


def test_a_copy_lies_with_the_downloaded_version_for_when_the_registry_is_down(version: registry.ModelVersion) -> None:
    local = Calibrations.beside(registry.download(version))
    for used in (MADE, another(0.1)):
        Calibrations.of_version(version).use(used)
        assert Calibrations.of_version(version).current() == used
        assert local.current() == used
        assert len(list((registry.download(version) / FOLDER).iterdir())) == 2, "only the one in use, and its name"
    Calibrations.of_version(version).revert(REGISTERED)
    registered = Calibrations.of_version(version).current()
    assert registered is not None
    assert local.current() == registered


def test_a_service_takes_it_up_at_its_next_look_without_loading_the_model_again(
    version: registry.ModelVersion, caplog: pytest.LogCaptureFixture
) -> None:
    source = model.source(f"models:/{version.name}/{version.version}", execution=model.Execution(batch=8))
    assert isinstance(source, model.Follower)
    source.look()
    before = source.current
    assert before is not None
    assert before.calibration is not None
    Calibrations.of_version(version).use(MADE)
    with caplog.at_level(logging.WARNING):
        source.look()
        source.look()
    after = source.current
    assert after is not None
    assert after.calibration == MADE
    assert before.calibration != MADE, "a request under way keeps what it began with"
    assert vars(after)["_encoder"] is vars(before)["_encoder"]
    assert [record.message for record in caplog.records if "decided by" in record.message] == [
        f"{version.label} is decided by calibration {MADE.id} now"
    ]

    restarted = model.CheckpointEmbedder(registry.download(version), version.name, "1", model.Execution(batch=8))
    assert restarted.calibration == MADE


def test_a_broken_calibration_changes_nothing_and_is_logged_once(
    version: registry.ModelVersion, caplog: pytest.LogCaptureFixture
) -> None:
    source = model.source(f"models:/{version.name}/1", execution=model.Execution(batch=8))
    assert isinstance(source, model.Follower)
    Calibrations.of_version(version).use(MADE)
    source.look()
    registry.tag(version, {TAG + CURRENT: "feed"})
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            source.look()
    assert source.current is not None
    assert source.current.calibration == MADE
    [record] = [record for record in caplog.records if "goes on serving" in record.message]
    assert "calibration 'feed' is in use but not stored; what is loaded goes on serving" in record.message


def test_a_version_whose_calibration_cannot_be_read_is_not_changed_over_to(version: registry.ModelVersion) -> None:
    """The thresholds that it was registered with may not be those in use."""
    stored = Calibrations.of_version(version)
    stored.use(MADE)
    wanted, broken = 1, False

    def load(number: int) -> model.Embedder:
        loaded = MeanColour()
        loaded.version, loaded.calibration = str(number), stored.registered()
        return loaded

    def calibrations(number: int) -> Calibrations:
        if broken:
            raise ConnectionError("refused")
        return stored

    def shown() -> tuple[str, Calibration | None]:
        assert follower.current is not None
        return follower.current.version, follower.current.calibration

    follower = model.Follower(lambda: wanted, load, calibrations=calibrations)
    follower.look()
    assert shown() == ("1", MADE)
    wanted, broken = 2, True
    follower.look()
    assert (shown(), follower.trouble) == (("1", MADE), "it cannot be loaded")
    broken = False
    follower.look()
    assert (shown(), follower.trouble) == (("2", MADE), None)

    follower, wanted, broken = model.Follower(lambda: wanted, load, calibrations=calibrations), 1, True
    follower.look()
    assert follower.current is None, "nor is it begun with"


def test_a_folder_is_recalibrated_live_too(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "mine", seed=0)
    source = model.source(str(folder), execution=model.Execution(batch=8))
    assert isinstance(source, model.Follower)
    source.look()
    assert source.current is not None
    assert source.current.calibration is None
    Calibrations.beside(folder).use(MADE)
    source.look()
    assert source.current.calibration == MADE

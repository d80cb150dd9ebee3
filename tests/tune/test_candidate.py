"""How the model to promote is named: runs, folders of one checkpoint or of several, registered versions."""

from pathlib import Path

import pytest

from cluster import registry
from cluster.run_folder import RANK
from cluster.tracking import Store
from dml import checkpoint, encoders
from dml.config import Config, DataConfig, EncoderConfig
from tune import candidate
from tune.objective import Outcome

CONFIG = Config(data=DataConfig(image_size=8), encoder=EncoderConfig(dim=4))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mlflow_store: str) -> Store:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONETHRESHOLD_CACHE", str(tmp_path / "cache"))
    return Store.open()


def saved(folder: Path, **report: object) -> str:
    encoder = encoders.build(CONFIG.encoder, channels=1, image_size=8)
    checkpoint.save(folder, encoder, CONFIG, info={"report": report})
    return str(folder)


def run(store: Store, name: str, parent: str | None = None, **tags: str) -> str:
    return store.start(name, params={}, tags=tags, parent=parent).run_id


def test_a_run_of_one_training_names_its_checkpoint(store: Store, tmp_path: Path) -> None:
    run_id = run(store, "single", kind="train", checkpoint="/somewhere/best")
    assert candidate.find(run_id, store) == candidate.Candidate(f"run {run_id}", "/somewhere/best", run_id)


def test_a_checkpoint_and_the_folder_of_its_training_are_one_model(store: Store, tmp_path: Path) -> None:
    """Of a training's folder the best is taken; the run that a checkpoint names counts where this store has it."""
    run_id = run(store, "folder", kind="train")
    saved(tmp_path / "autumn" / "step-000000009-b", run_id=run_id, **{RANK: 0.5})
    best = saved(tmp_path / "autumn" / "step-000000005-a", run_id=run_id, **{RANK: 1.0})
    found = candidate.find(str(tmp_path / "autumn"), store)
    assert (found.checkpoint, found.run_id) == (best, run_id)
    assert candidate.find("autumn/step-000000005-a", store).checkpoint == best
    elsewhere = saved(tmp_path / "copied", run_id="f" * 32)
    assert candidate.find(elsewhere, store).run_id == ""


def test_of_a_trial_the_baseline_of_its_own_seed_is_found(store: Store, tmp_path: Path) -> None:
    search = store.start("search", params={}, tags={"kind": "search"})
    runs = [run(store, f"trial {n}", search.run_id, kind="trial") for n in range(5)]
    places = [saved(tmp_path / f"trial-{n}", run_id=runs[n]) for n in range(4)]

    def ended(number: int, which: int, seed: int | None = None, state: str = "finished") -> Outcome:
        settings = {} if seed is None else {"train.seed": seed}
        place = places[which] if state == "finished" else ""
        return Outcome(number, state, settings, checkpoint=place, run_id=runs[which])

    outcomes = [ended(0, 0), ended(3, 1), ended(0, 2, seed=1), ended(3, 3, seed=1), ended(4, 4, state="pruned")]
    with search.writing() as record:
        record.json(candidate.rows([*outcomes, outcomes[0]]), candidate.MODELS)

    assert [candidate.find(run_id, store).checkpoint for run_id in runs[:4]] == places
    assert [candidate.find(run_id, store).baseline for run_id in runs[:4]] == ["", places[0], "", places[2]]
    assert candidate.find(places[3], store).baseline == places[2], "also by the checkpoint's folder"
    with pytest.raises(ValueError, match=r"\(trial\) has no checkpoint: .* it was stopped early"):
        candidate.find(runs[4], store)


def test_a_search_stands_for_the_version_that_it_registered(store: Store, tmp_path: Path) -> None:
    search = run(store, "registering", kind="search", registered="candidates/1")
    with pytest.raises(ValueError, match="models:/candidates/1 is not in the MLflow registry"):
        candidate.find(search, store)
    version = registry.register(
        Path(saved(tmp_path / "model")), run_id=search, operating_points=[], metrics={}, name="candidates"
    )
    found = candidate.find(search, store)
    assert found == candidate.find("models:/candidates/1", store)
    assert (found.version, found.label, found.run_id) == (version, "candidates@1", search)
    assert checkpoint.load(found.checkpoint).config == CONFIG

"""A run's folder: its record, which checkpoint is newest, which is best, and what Ray Train keeps of them."""

import json
from pathlib import Path

import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster import run_folder
from cluster.run_folder import KEPT, RANK, Record, RunFolder
from dml import checkpoint, encoders
from dml.config import Config
from dml.state import Progress, State

CONFIG = Config().replace(**{"data.image_size": 16, "encoder.dim": 8, "loss.options.alpha": 3.0})


def write(folder: RunFolder, step: int, rank: float, name: str = "") -> str:
    """A checkpoint as a worker leaves it; its name."""
    torch.manual_seed(step)
    encoder = encoders.build(CONFIG.encoder, channels=1, image_size=16)
    state = State(CONFIG, Progress(step=step), {})
    name = name or run_folder.checkpoint_name(step)
    path = Path(folder.storage) / folder.name / name
    checkpoint.save(path, encoder, CONFIG, info={"report": {RANK: rank}}, state=state)
    return name


def cut(folder: RunFolder, name: str, file: str = "encoder.safetensors") -> None:
    path = Path(folder.storage) / folder.name / name / file
    path.write_bytes(path.read_bytes()[:-1])


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "store"), "autumn")


def test_the_record_comes_back_and_a_name_is_taken_once(folder: RunFolder) -> None:
    record = Record(CONFIG, "autumn/1", "models:/onethreshold/3", {"workers": 2, "cpus_per_worker": None})
    folder.begin(record)
    assert folder.record() == record
    with pytest.raises(ValueError, match="has a run autumn; --resume autumn goes on with it"):
        folder.begin(record)


def test_a_name_that_does_not_exist_is_answered_with_those_that_do(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match=r"no run 'winter' in .*store; runs there: none"):
        RunFolder(folder.storage, "winter").record()
    folder.begin(Record(CONFIG, ""))
    RunFolder(folder.storage, "spring").begin(Record(CONFIG, ""))
    (Path(folder.storage) / "something else").mkdir()
    with pytest.raises(ValueError, match=r"runs there: autumn, spring$"):
        RunFolder(folder.storage, "winter").record()


def test_a_record_of_unknown_settings_is_refused_with_its_file(folder: RunFolder) -> None:
    folder.begin(Record(CONFIG, ""))
    path = Path(folder.storage) / "autumn" / "run.json"
    path.write_text(path.read_text().replace('"weight_decay"', '"weight_loss"'))
    with pytest.raises(ValueError, match=r"autumn/run[.]json is unreadable: optim[.]weight_loss: Extra"):
        folder.record()
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match=r"autumn/run[.]json is unreadable: Unterminated"):
        folder.record()


def test_the_newest_whole_checkpoint_is_found_and_what_is_wrong_with_newer_ones(folder: RunFolder) -> None:
    assert folder.newest().state is None, "nothing yet"
    names = [write(folder, step, 0.5) for step in (8, 16, 24)]
    assert folder.newest().name == names[2]
    cut(folder, names[2])
    (Path(folder.storage) / folder.name / "step-000000032-0").mkdir()  # a worker died before the first file
    found = folder.newest()
    assert found.name == names[1]
    assert found.state is not None
    assert found.state.progress.step == 16
    assert ["step-000000032" in found.unusable[0], "step-000000024" in found.unusable[1]] == [True, True]
    cut(folder, names[0])
    cut(folder, names[1])
    assert (folder.newest().name, len(folder.newest().unusable)) == ("", 4)


def test_the_best_is_the_last_of_rising_ranks_that_is_whole(folder: RunFolder) -> None:
    assert folder.best() == ""
    write(folder, 8, -0.5)
    assert folder.best() == "", "no epoch has been evaluated"
    names = [write(folder, step, rank) for step, rank in ((16, 1), (24, 0.5), (32, 2), (40, 1.5))]
    assert folder.best() == f"{folder.storage}/autumn/{names[2]}"
    # The broken one was trained again and is there twice.
    again = write(folder, 32, 2, "step-000000032-zz")
    cut(folder, again)
    assert folder.best() == f"{folder.storage}/autumn/{names[2]}"


@given(scores=st.lists(st.integers(0, 4) | st.none(), min_size=1, max_size=12))
def test_ray_trains_rule_keeps_the_best_the_newest_and_the_one_before(scores: list[int | None]) -> None:
    """Its rule: the KEPT highest, later ones first among equals, and the newest. None: a checkpoint within an epoch."""
    kept: list[tuple[float, int]] = []
    best, bests = -1, 0
    best_at: int | None = None
    for index, score in enumerate(scores):
        better = score is not None and score > best
        if better:
            assert score is not None
            best, bests, best_at = score, bests + 1, index
        kept.append((run_folder.rank(bests, best=better), index))
        kept = sorted(place for place in kept if place in sorted(kept)[-KEPT:] or place[1] == index)
        wanted = {index, max(0, index - 1)} | ({best_at} if best_at is not None else set())
        assert wanted <= {at for _, at in kept}
        assert len(kept) <= KEPT
        if best_at is not None:
            assert kept[-1][1] == best_at


@pytest.mark.parametrize("content", ["", '{"ray_version": "2.0.0", "checkpoint_results": []}', "[1]"])
def test_a_list_that_ray_train_would_refuse_is_set_aside(folder: RunFolder, content: str) -> None:
    folder.begin(Record(CONFIG, ""))
    assert folder.mend() == ""
    path = Path(folder.storage) / "autumn" / "checkpoint_manager_snapshot.json"
    path.write_text(content)
    assert folder.mend() != ""
    assert not path.exists()


def test_a_list_is_kept_unless_it_names_a_checkpoint_that_is_gone(folder: RunFolder) -> None:
    name = write(folder, 8, 1)
    path = Path(folder.storage) / "autumn" / "checkpoint_manager_snapshot.json"
    listed = {"ray_version": ray.__version__, "checkpoint_results": [{"checkpoint_dir_name": name}]}
    path.write_text(json.dumps(listed))
    assert folder.mend() == ""
    listed["checkpoint_results"] = [{"checkpoint_dir_name": "step-000000007-0"}]
    path.write_text(json.dumps(listed))
    assert folder.mend() == "step-000000007-0 missing"


def test_a_trial_keeps_its_best_checkpoint_and_its_newest(folder: RunFolder, tmp_path: Path) -> None:
    """Ranks as a trial gives them: a best epoch, a worse one, a better one, and a worse one again."""
    kept = []
    for step, rank in ((10, 1.0), (20, 0.5), (30, 2.0), (40, 1.5)):
        made = RunFolder(str(tmp_path / "scratch"), "trial")
        folder.keep(tmp_path / "scratch" / "trial" / write(made, step, rank), step)
        kept.append(steps(folder))
    assert kept == [[10], [10, 20], [30], [30, 40]]
    assert folder.newest().name.startswith("step-000000040")
    assert "step-000000030" in folder.best()

    assert folder.ended() is None
    folder.end({"best/score": 0.5, "run_id": "1"})
    assert folder.ended() == {"best/score": 0.5, "run_id": "1"}
    assert steps(folder) == [30], "nothing goes on from here"


def test_a_checkpoint_takes_the_place_of_what_an_interruption_left_behind(folder: RunFolder, tmp_path: Path) -> None:
    write(folder, 10, 1.0)
    cut(folder, write(folder, 20, 2.0))  # the process was killed as it copied
    assert folder.newest().name.startswith("step-000000010")
    made = RunFolder(str(tmp_path / "scratch"), "trial")
    folder.keep(tmp_path / "scratch" / "trial" / write(made, 20, 2.0), 20)
    assert steps(folder) == [20]
    assert folder.newest().unusable == ()
    assert "step-000000020" in folder.best()


def test_searches_and_trainings_are_told_apart(folder: RunFolder) -> None:
    search = RunFolder(folder.storage, "winter", "search")
    search.begin(Record(CONFIG, "winter", resources={"trials": 8}))
    folder.begin(Record(CONFIG, "autumn"))
    assert (search.begun, RunFolder(folder.storage, "winter").begun) == (True, False)
    with pytest.raises(ValueError, match=r"there is no run 'winter' in .*; runs there: autumn$"):
        RunFolder(folder.storage, "winter").record()
    with pytest.raises(ValueError, match=r"there is no search 'autumn' in .*; searches there: winter$"):
        RunFolder(folder.storage, "autumn", "search").record()


def test_a_search_and_a_training_do_not_share_a_folder(folder: RunFolder) -> None:
    folder.begin(Record(CONFIG, "autumn/1"))
    for step, rank in ((10, 1.0), (20, 0.5)):
        write(folder, step, rank)
    search = RunFolder(folder.storage, "autumn", "search")
    with pytest.raises(ValueError, match="has a run autumn; give another --name"):
        search.begin(Record(CONFIG, "autumn/2"))
    search.end({"trials": 8})
    assert steps(folder) == [10, 20], "checkpoints are the training's"


def steps(folder: RunFolder) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (Path(folder.storage) / folder.name).glob("step-*"))

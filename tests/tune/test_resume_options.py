"""`--resume NAME`: what it takes up, what may be another, and what it refuses in words before Ray is started."""

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.run_folder import RunFolder
from tune import resume, search, storage
from tune.options import Options


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A search that was begun in this folder and interrupted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(storage.VARIABLE, raising=False)
    begin("autumn", "--trials", "6", "--objective.mode", "pareto", "--space", "optim.lr=log(1e-4,1e-2)")
    return tmp_path


def begin(name: str, *words: str) -> None:
    from cluster import command_line

    options = command_line.parse(Options, ["--recipe", "digits", "--train.epochs", "5", *words], budget="short")
    url = storage.url(options.optuna_storage)
    resume.begun(RunFolder(str(Path("runs/ray").absolute()), name, "search"), options, url)


def test_a_search_goes_on_with_the_options_that_it_began_with(begun: Path) -> None:
    options = resume.options_of(Options, ["--resume", "autumn", "--trials", "9", "--trials-at-once", "1"], "autumn")
    assert options.config.train.epochs == 5
    assert options.objective.mode == "pareto"
    assert options.space == ("optim.lr=log(1e-4,1e-2)",)
    assert (options.trials, options.trials_at_once, options.resume) == (9, 1, "autumn"), "these may be others"
    assert options.optuna_storage == f"sqlite:///{begun / 'runs' / 'optuna.db'}", "from whatever folder"


def test_a_password_is_not_kept_and_is_asked_for_again(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "postgresql+psycopg://me:secret@nowhere/studies"
    begin("winter", "--optuna-storage", url)
    kept = (begun / "runs" / "ray" / "winter" / "search.json").read_text()
    assert "secret" not in kept
    assert "postgresql+psycopg://me:***@nowhere/studies" in kept
    options = resume.options_of(Options, ["--resume", "winter"], "winter")
    place = str(begun / "runs" / "ray")
    with pytest.raises(ValueError, match=r"the study of winter is in postgresql\+psycopg://me:\*\*\*@nowhere/studies"):
        resume.place(options, place, storage.url(options.optuna_storage), 8)
    monkeypatch.setenv(storage.VARIABLE, url)
    assert resume.place(options, place, storage.url(options.optuna_storage), 8).name == "winter"


def test_a_password_among_a_urls_parameters_is_asked_for_again(begun: Path) -> None:
    begin("spring", "--optuna-storage", "postgresql+psycopg://me@nowhere/studies?password=secret")
    assert "secret" not in (begun / "runs" / "ray" / "spring" / "search.json").read_text()
    assert resume.options_of(Options, ["--resume", "spring"], "spring").optuna_storage == ""


def test_two_searches_of_one_name_have_mlflow_runs_of_their_own(begun: Path) -> None:
    """As two people's, or one's on two storages, may have."""
    options = resume.options_of(Options, ["--resume", "autumn"], "autumn")
    url = storage.url(options.optuna_storage)
    here, there = (RunFolder(str(begun / place), "autumn", "search") for place in ("runs/ray", "elsewhere"))
    first, second = resume.begun(here, options, url), resume.begun(there, replace(options, resume=""), url)
    assert first.key == here.record().key, "one that goes on has the run that it began with"
    assert len({first.key, second.key}) == 2
    assert all(key.startswith("autumn/") for key in (first.key, second.key))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume"], "--resume needs a value"),
        (["--resume", "summer"], "there is no search 'summer' in "),
        (["--resume", "autumn", "--recipe", "digits"], "--recipe does not go with --resume"),
        (["--resume", "autumn", "--name", "spring"], "--name does not go with --resume"),
        (["--resume", "autumn", "--optim.lr", "0.5"], "but optim.lr is 0.5, was 0.001"),
        (["--resume", "autumn", "--objective.mode", "combined"], "but objective is mode='combined'"),
        (["--resume", "ended"], "ended has ended, with 4 trials; --trials can make it more"),
        (["--resume", "grid"], "grid has ended, with 83 trials; its grid has no more"),
        (["--resume", "grid", "--trials", "200"], "grid has ended, with 83 trials; its grid has no more"),
    ],
)
def test_what_would_be_another_search_is_refused(
    begun: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    begin("ended", "--trials", "4")
    begin("grid", "--trials", "100", "--sampler", "grid")
    for name, trials in (("ended", 4), ("grid", 83)):
        RunFolder(str(begun / "runs" / "ray"), name, "search").end({"trials": trials})
    with pytest.raises(SystemExit) as stop:
        search.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_job_that_is_tried_again_begins_a_search_once_and_then_goes_on(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--recipe", "digits", "--budget", "short", "--trials", "6", "--go-on", "--name"]
    assert resume.words_of([*words, "spring"]) == [*words, "spring"], "there is none: it is begun"
    assert resume.words_of([*words, "autumn"]) == ["--trials", "6", "--go-on", "--resume", "autumn"]
    options = resume.options_of(Options, resume.words_of([*words, "autumn"]), "autumn")
    assert (options.resume, options.trials, options.config.train.epochs) == ("autumn", 6, 5)

    RunFolder(str(begun / "runs" / "ray"), "autumn", "search").end({"trials": 6})
    assert search.main([*words, "autumn"]) == 0
    assert "search autumn has ended, with its 6 trials: nothing is left to do" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--go-on"], ["--go-on", "--resume", "autumn"]])
def test_going_on_needs_a_name(begun: Path, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        search.main(words)
    assert stop.value.code == 2
    assert "--go-on goes with --name" in capsys.readouterr().err

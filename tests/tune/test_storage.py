"""Where a study is kept: which database, what is said when it cannot be opened, and that no password shows."""

from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from dml import recipes
from tests.servers import Postgres, free_port
from tune import early_stopping, sampler, search, storage
from tune.objective import Objective
from tune.optuna_search import StudySearch
from tune.space import Space
from tune.trials import Bench


def test_a_study_lies_in_sqlite_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(storage.VARIABLE, raising=False)
    assert storage.url("") == f"sqlite:///{tmp_path / 'runs' / 'optuna.db'}"
    monkeypatch.setenv(storage.VARIABLE, "postgresql://u:secret@h/d")
    assert storage.url("") == "postgresql+psycopg://u:secret@h/d"
    assert storage.url("sqlite:////x.db") == "sqlite:////x.db"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://u:secret@h:5432/d", "postgresql+psycopg://u:***@h:5432/d"),
        ("postgresql://u@h/d?sslmode=require", "postgresql://u@h/d?sslmode=require"),
        ("sqlite:////shared/optuna.db", "sqlite:////shared/optuna.db"),
    ],
)
def test_a_password_is_not_shown(url: str, shown: str) -> None:
    assert storage.shown(url) == shown
    assert "secret" not in storage.shown("postgresql://u@h/d?password=secret&sslpassword=secret")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("optuna.db", "is no URL of a database, such as sqlite:////shared/optuna.db or postgresql://"),
        ("postgresql://u:secret@h:port/d", "is no URL of a database"),
        ("nosuch://u:secret@h/d", "nosuch://u:***@h/d: SQLAlchemy knows no such database or driver"),
        ("mssql+pymssql://u:secret@h/d", "mssql+pymssql://u:***@h/d: pymssql is not installed"),
        ("sqlite:////no/such/folder/optuna.db", "optuna.db cannot be opened: unable to open database file"),
    ],
)
def test_a_database_that_cannot_be_opened_is_named_without_its_password(url: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        storage.connect(storage.url(url))
    assert message in str(error.value)
    assert "secret" not in str(error.value)


def test_the_search_refuses_it_before_ray(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        search.main(["--recipe", "digits", "--optuna-storage", "optuna.db"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: --optuna-storage is no URL of a database")


def test_in_a_job_it_lies_with_what_is_kept_which_may_be_the_first_thing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.delenv(storage.VARIABLE, raising=False)
    url = storage.url("", str(tmp_path / "new" / "storage"))
    assert storage.trials(url, "a search") == 0
    assert (tmp_path / "new" / "storage" / "optuna.db").is_file()


@pytest.fixture
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server of Debian's package on loopback, with a password."""
    pytest.importorskip("psycopg")
    port = free_port()
    server = Postgres("searcher", "secret/with:signs@", ["--auth=scram-sha-256"], port=port)
    yield f"postgresql://searcher:secret%2Fwith%3Asigns%40@127.0.0.1:{port}/postgres"
    server.stop()


@pytest.mark.slow
def test_a_study_in_postgresql(
    postgres: str, tmp_path: Path, ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real server: a search, its state without the password, and what a second look at the study finds."""

    def train(params: dict[str, object]) -> None:
        import ray.tune

        number = float(str(params["number"]))
        for epoch in range(1, 9):
            recall = (0.9 + number / 100) * epoch / 8
            report = {"epoch": epoch, "best/recall@1": recall, "best/opis": 0.01, "best/score": recall - 0.1}
            ray.tune.report(report)
        ray.tune.report({**report, "ended": True})

    url = storage.url(postgres)
    recipe = recipes.digits("short").replace(**{"train.epochs": 8})
    space = Space.of([], recipe)
    searcher = StudySearch(
        space,
        Objective(),
        sampler=sampler.build("tpe", seed=0, trials=6),
        points=space.first_points(),
        trials=6,
        design=True,
        study="far away",
        url=url,
    )
    bench = Bench(str(tmp_path / "ray"), train, {"CPU": 1}, 2)
    outcomes = bench.search(searcher, early_stopping.build("asha", recipe.train))
    states = {outcome.number: outcome.state for outcome in outcomes}
    trials = optuna.load_study(study_name="far away", storage=url).trials
    told = {"finished": "COMPLETE", "pruned": "PRUNED"}
    assert [trial.state.name for trial in trials] == [told[states[number]] for number in range(6)]
    kept = [path for path in (tmp_path / "ray").rglob("*") if path.is_file() and b"secret" in path.read_bytes()]
    assert kept == [], "no file of the search holds the password"
    said = capsys.readouterr()
    assert "secret" not in said.out + said.err

    with pytest.raises(ValueError, match=r"searcher:\*\*\*@127.*password authentication failed") as refused:
        storage.connect(url.replace("secret", "guess"))
    assert "guess" not in str(refused.value)

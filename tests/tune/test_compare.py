"""Baseline and TCM side by side over paired seeds, with real Ray and MLflow."""

from pathlib import Path

import mlflow
import pytest

from tune import compare


@pytest.mark.slow
def test_pairs_share_their_seed_and_are_told_apart(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ray_local: None,
    mlflow_store: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--recipe", "digits", "--train.epochs", "1", "--train.seed", "5", "--seeds", "2", "--tcm.weight", "0.2"]
    assert compare.main(words) == 0
    said = capsys.readouterr().out
    assert "[4/4] trained" in said
    assert "2 test classes, 2 paired seeds" in said
    assert "TCM changes mean OPIS by " in said
    runs = mlflow.search_runs(search_all_experiments=True, filter_string="tags.kind = 'compare'", output_format="list")
    sides = {
        (r.data.params["train.seed"], float(r.data.params["tcm.weight"])) for r in runs if "val/opis" in r.data.metrics
    }
    assert sides == {("5", 0.0), ("5", 0.2), ("6", 0.0), ("6", 0.2)}
    assert {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "tcm.weight: 0 is the baseline itself"), (["--seeds", "0", "--tcm.weight", "1"], "seeds: 0")],
)
def test_what_cannot_be_compared_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        compare.main(["--recipe", "digits", *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err

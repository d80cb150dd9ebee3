"""The figures' data against loops that compute them anew."""

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from dml.metrics.threshold import utility
from tests.tune.page.fabricated import findings
from tune.page import Findings, settings, tables, trials
from tune.page import utility as utilities
from tune.page.figure import Panel, frame, plain
from tune.page.importance import FIGURES, LEAST, shares

STATES = {3: "failed", 5: "pruned", 9: "unfinished"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    words = ["optim.lr=log(1e-5,1e-4)", "encoder.dim=[128,512]", "optim.name=[adamw,sgd]"]
    return findings(tmp_path_factory.mktemp("study"), trials=20, states=STATES, words=words, classes=70)


def traces(panel: Panel) -> dict[str, dict[str, Any]]:
    assert panel.figure is not None, panel.caption
    assert panel.alternative
    return {trace.get("name") or trace["type"]: trace for trace in panel.figure["data"]}


def numbers(trace: dict[str, Any]) -> list[int]:
    return [int(text.split()[1].split("<")[0].rstrip(",")) for text in trace["hovertext"]]


def test_history_shows_every_trial_once_and_the_best_of_those_that_can_win(found: Findings) -> None:
    (panel,) = trials.history(found)
    shown = traces(panel)
    line = shown.pop("best so far")
    assert sorted(number for trace in shown.values() for number in numbers(trace)) == [
        number for number in range(20) if number not in (3, 9)
    ]
    assert numbers(shown["stopped early"]) == [5]
    assert found.baseline is not None
    least = found.baseline.recall - found.objective.tolerance
    best = -np.inf
    for x, y in zip(line["x"][:-1], line["y"][:-1], strict=True):
        outcome = next(outcome for outcome in found.outcomes if outcome.number == x)
        assert outcome.state == "finished"
        assert outcome.recall >= least
        best = max(best, outcome.score)
        assert y == best
    assert (line["x"][-1], line["y"][-1]) == (19, best)
    assert "Failed, or did not end: trials 3, 9." in panel.caption


@pytest.mark.parametrize(("mode", "labels"), [("constrained", ["OPIS"]), ("pareto", ["Recall@1", "OPIS"])])
def test_history_is_of_what_the_search_looks_for(tmp_path: Path, mode: str, labels: list[str]) -> None:
    panels = trials.history(findings(tmp_path, mode=mode, trials=6))  # type: ignore[arg-type]
    assert [panel.title for panel in panels] == [f"History of the search: {label}" for label in labels]


def test_no_trial_beats_one_on_the_front(found: Findings) -> None:
    shown = traces(trials.pareto(found))
    line = shown["Pareto front"]
    corners = list(zip(line["x"], line["y"], strict=True))[1:-1]
    points = [(outcome.opis**0.5, outcome.recall) for outcome in found.finished]
    ahead = [p for p in points if not any(o != p and o[0] <= p[0] and o[1] >= p[1] for o in points)]
    assert sorted(corners) == sorted(ahead)
    assert numbers(shown["baseline, no TCM"]) == [0]
    assert found.chosen is not None
    assert numbers(shown["winner"]) == [found.chosen.number]


def test_a_slice_for_every_setting_on_its_own_scale(found: Findings) -> None:
    panels = {panel.title: panel for panel in settings.slices(found)}
    assert list(panels) == ["margin_pos", "margin_neg", "weight", "start", "optim.lr", "encoder.dim", "optim.name"]
    axes = {name: panel.figure["layout"]["xaxis"] for name, panel in panels.items() if panel.figure is not None}
    assert [name for name, axis in axes.items() if axis.get("type") == "log"] == ["weight", "optim.lr"]
    assert axes["encoder.dim"]["categoryarray"] == ["128", "512"]
    assert axes["optim.name"]["categoryarray"] == ["adamw", "sgd"]
    with_tcm = sum(len(trace["x"]) for trace in traces(panels["margin_pos"]).values())
    everything = sum(len(trace["x"]) for trace in traces(panels["optim.name"]).values())
    assert (with_tcm, everything) == (17, 18), "the baseline has no margins, and its optimiser lies in the space"


def test_contours_meet_the_trials_that_they_run_through(found: Findings) -> None:
    for panel, metric in zip(settings.contours(found), ("score", "opis"), strict=True):
        surface = traces(panel)["contour"]
        heights = np.array(surface["z"], dtype=float)
        inner = heights[~np.isnan(heights)]
        values = [o.metrics[f"best/{metric}"] for o in found.finished if o.number]
        assert min(values) <= inner.min() < inner.max() <= max(values)
        best = max(values) if metric == "score" else min(values)
        assert f"{best:.5g}" in panel.alternative


def test_trials_on_a_line_have_no_contour(tmp_path: Path) -> None:
    for name, words in (("point", ["tcm.margin_pos=[0.9]"]), ("few", [])):
        trials = 12 if words else 4
        found = findings(tmp_path, trials=trials, words=words, name=name)
        (panel,) = settings.contours(found)
        shown = traces(panel)
        assert "contour" not in shown
        assert sum(len(trace["x"]) for trace in shown.values()) == trials - 1, "all but the baseline"
        assert "too few for contours, or all on one line" in panel.caption


def test_importance_finds_what_the_figure_hangs_on() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for number in range(60):
        trial = study.ask()
        off = trial.suggest_categorical("tcm", ["off", "on"]) == "off"
        one, other = trial.suggest_float("one", 0, 1), trial.suggest_float("other", 0, 1)
        if not off:
            trial.suggest_float("tcm.weight", 0.1, 1)
        for name, value in {"score": one, "recall@1": other, "opis": 0.25}.items():
            # Without TCM the figures would say the opposite.
            trial.set_user_attr(name, -10 * number if off else value)
        study.tell(trial, one)
    found = shares(study)
    assert set(found) == {"score", "Recall@1"}, "a figure that never varies has no shares"
    assert all(sum(parts.values()) == pytest.approx(1) for parts in found.values())
    assert found["score"]["one"] > 0.9
    assert found["Recall@1"]["other"] > 0.9
    assert set(found["score"]) == {"one", "other", "tcm.weight"}


def test_importance_is_not_made_up(tmp_path: Path) -> None:
    few = findings(tmp_path, trials=LEAST, name="few")  # one of them is the baseline
    assert few.importances == {}
    panel = settings.importance(few)
    assert panel.figure is None
    assert "Not defined here: it takes at least 4 finished trials with TCM on" in panel.caption
    whole = settings.importance(findings(tmp_path, trials=12, mode="pareto", name="enough"))
    assert list(traces(whole)) == list(FIGURES.values())
    assert "a hint, no more" in whole.caption


@pytest.mark.parametrize("classes", [12, 70])
def test_utility_is_drawn_of_both_models_on_one_scale(tmp_path: Path, classes: int) -> None:
    found = findings(tmp_path, trials=4, classes=classes)
    panels = utilities.curves(found)
    assert [panel.title for panel in panels] == ["Utility of the baseline", "Utility of the winner"]
    axes = [(p.figure["layout"]["xaxis"]["range"], p.figure["layout"]["yaxis"]["range"]) for p in panels if p.figure]
    assert axes[0] == axes[1]
    assert found.tested is not None
    assert found.tested.curves is not None
    expected = utility(found.tested.curves)
    shown = traces(panels[1])
    assert shown["mean over classes"]["y"] == pytest.approx(expected.mean(axis=0))
    if classes == 12:
        drawn = [value for value in shown["one class (12 in all)"]["y"] if value is not None]
        assert drawn == pytest.approx(expected.ravel())
    else:
        band = shown["80% of classes"]["y"]
        assert band[: len(band) // 2] == pytest.approx(np.quantile(expected, 0.9, axis=0))


def test_the_table_ranks_by_the_searchs_rule_and_keeps_every_trial(found: Findings) -> None:
    table = tables.trials(found)
    assert sorted(int(row[0]) for row in table.rows) == list(range(20))
    ranked = [int(row[0]) for row in table.rows if row[2]]
    assert ranked == [outcome.number for outcome in found.judged]
    rows = {int(row[0]): dict(zip(table.head, row, strict=True)) for row in table.rows}
    assert rows[3]["State"] == "failed: NonFiniteLossError: loss is nan at step 12; last losses: 0.31, nan"
    assert rows[5]["State"] == "stopped early"
    assert rows[9]["State"] == "did not end"
    assert rows[3]["Score"] == rows[9]["Score"] == rows[0]["margin_pos"] == ""
    assert rows[0]["optim.lr"] == f"{found.config.optim.lr:.3g}", "the recipe's own, though it is not searched there"
    (marked,) = table.marked
    assert found.chosen is not None
    assert table.rows[marked][:2] == (str(found.chosen.number), "finished (winner)")


def test_a_far_outlier_does_not_press_the_others_together() -> None:
    values = [0.90, 0.91, 0.92, 0.93, 0.1]
    low, high = frame(values, [])
    assert 0.85 < low < 0.90
    assert 0.93 < high < 0.95
    assert frame(values, [0.1])[0] < 0.1, "what must be seen is seen"
    low, high = frame([0.5], [])
    assert low < 0.5 < high


def test_texts_stay_texts_in_a_figure() -> None:
    assert plain("<b>&amp;\n x") == "&lt;b&gt;&amp;amp; x"
    assert len(plain("x" * 100, 28)) == 28

"""Optuna behind Ray Tune: made-up figures through the real two, and what the study says of each trial afterwards."""

import math
import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from ray.tune.schedulers import FIFOScheduler

from dml import recipes
from tune import early_stopping, sampler
from tune.objective import Mode, Objective, Outcome
from tune.optuna_search import StudySearch
from tune.space import Point, Space
from tune.trials import RETRIES, Bench

EPOCHS = 8
RECIPE = recipes.digits("short").replace(**{"train.epochs": EPOCHS})
BASELINE = {"val/similarity_at_far_min": 0.6, "val/similarity_at_far_max": 0.3, "val/similarity_at_frr_max": 0.5}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'optuna.db'}"


def searcher(
    url: str,
    mode: Mode = "combined",
    trials: int = 8,
    name: sampler.SamplerName = "random",
    design: bool = True,
    hopeless: int = 0,
) -> StudySearch:
    space = Space.of([], RECIPE, flat=name in sampler.FLAT)
    return StudySearch(
        space,
        Objective(mode=mode),
        sampler=sampler.build(name, seed=0, trials=trials),
        points=space.first_points(),
        trials=trials,
        design=design,
        study="stub",
        url=url,
        hopeless=hopeless,
    )


def study(url: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name="stub", storage=url).trials


def figures(recall: float, opis: float, epoch: int = EPOCHS, **more: Any) -> dict[str, Any]:
    return {"epoch": epoch, "best/recall@1": recall, "best/opis": opis, "best/score": recall - opis**0.5, **more}


def trainable() -> Callable[[Any], None]:
    """Trials whose figures depend on their number alone: 3 fails, 4 is hopeless from the beginning."""

    similarities = {"far_min": 0.6, "far_max": 0.3, "frr_max": 0.5}

    def train(params: dict[str, Any]) -> None:
        import ray.tune

        number = params["number"]
        if number == 3:
            ray.tune.report({"error": "RuntimeError: broken on purpose", "ended": True})
            return
        recall = 0.5 if number == 4 else 0.90 + 0.01 * number
        opis = 0.02 / (1 + number)
        report: dict[str, Any] = {}
        for epoch in range(1, 9):
            at = recall * epoch / 8
            report = {"epoch": epoch, "best/recall@1": at, "best/opis": opis, "best/score": at - opis**0.5}
            report |= {f"val/similarity_at_{name}": at for name, at in similarities.items()}
            ray.tune.report(report)
        ray.tune.report(report | {"ended": True})

    return train


def bench(tmp_path: Path, train: Callable[[Any], None] | None = None, at_once: int = 1) -> Bench:
    return Bench(str(tmp_path / "ray"), train or trainable(), {"CPU": 1}, at_once)


def search(tmp_path: Path, url: str, mode: Mode, stop: early_stopping.EarlyStop = "asha") -> list[Outcome]:
    scheduler = early_stopping.build(stop, RECIPE.train)
    return bench(tmp_path).search(searcher(url, mode), scheduler)


def test_a_search_is_told_to_optuna_as_it_went(tmp_path: Path, url: str, ray_local: None) -> None:
    outcomes = search(tmp_path, url, "combined")
    states = {outcome.number: outcome.state for outcome in outcomes}
    assert [states[number] for number in range(5)] == ["finished"] * 3 + ["failed", "pruned"]
    assert next(o.error for o in outcomes if o.number == 3) == "RuntimeError: broken on purpose"

    trials = study(url)
    told = {"finished": "COMPLETE", "failed": "FAIL", "pruned": "PRUNED"}
    assert [trial.state.name for trial in trials] == [told[states[trial.number]] for trial in trials], (
        "none is left over"
    )
    assert trials[3].user_attrs["error"] == "RuntimeError: broken on purpose"
    baseline, paper, designed = trials[:3]
    assert baseline.params == {"tcm": "off"}
    assert paper.params["tcm.margin_pos"] == 0.9
    assert (designed.params["tcm.margin_pos"], designed.params["margin_ratio"]) == pytest.approx((0.6, 0.5))

    for outcome in outcomes:
        trial = trials[outcome.number]
        if outcome.state == "finished":
            assert trial.values == [outcome.score]
            assert trial.constraints == {"recall@1": pytest.approx(0.90 - 0.005 - outcome.recall)}
        if outcome.state in ("finished", "pruned"):
            expected = {"recall@1": outcome.recall, "opis": outcome.opis, "score": outcome.score}
            assert {name: trial.user_attrs[name] for name in expected} == pytest.approx(expected)
            assert trial.intermediate_values[max(trial.intermediate_values)] == outcome.score
        if outcome.state == "pruned":
            assert max(trial.intermediate_values) == outcome.metrics["epoch"] < EPOCHS


def test_pareto_tells_both_figures(tmp_path: Path, url: str, ray_local: None) -> None:
    outcomes = search(tmp_path, url, "pareto", "median")
    found = optuna.load_study(study_name="stub", storage=url)
    assert [direction.name for direction in found.directions] == ["MAXIMIZE", "MINIMIZE"]
    for outcome in outcomes:
        told = found.trials[outcome.number]
        if outcome.state == "finished":
            assert told.values == [outcome.recall, outcome.opis]
        else:
            assert told.state.name == {"failed": "FAIL", "pruned": "PRUNED"}[outcome.state]


def test_constrained_minimises_opis(url: str) -> None:
    asked = searcher(url, "constrained")
    for trial_id, recall, opis in (("a", 0.9, 0.02), ("b", 0.8, 0.001)):
        asked.suggest(trial_id)
        asked.on_trial_complete(trial_id, figures(recall, opis, ended=True))
    found = optuna.load_study(study_name="stub", storage=url)
    assert found.direction.name == "MINIMIZE"
    assert found.best_trial.number == 0, "the second is not within the tolerance"


def test_until_the_baseline_has_ended_the_best_recall_stands_in_for_its_own(url: str) -> None:
    asked = searcher(url)
    for trial_id in "abcd":
        asked.suggest(trial_id)
    for trial_id, recall in (("b", 0.95), ("c", 0.90), ("a", 0.92), ("d", 0.90)):
        asked.on_trial_complete(trial_id, figures(recall, 0.01, ended=True))
    constraint = [trial.constraints["recall@1"] for trial in study(url)[:4]]
    assert constraint == pytest.approx([-0.005, -0.005, 0.045, 0.015])


def test_a_trial_without_finite_figures_fails(url: str) -> None:
    asked = searcher(url)
    ends: list[dict[str, Any] | None] = [figures(0.9, math.nan, ended=True), {"epoch": 1}, None]
    for trial_id, result in zip("abc", ends, strict=True):
        asked.suggest(trial_id)
        asked.on_trial_complete(trial_id, result)
    assert [trial.state.name for trial in study(url)[:3]] == ["FAIL"] * 3


def test_points_are_enqueued_once_also_when_the_study_is_there(url: str) -> None:
    first = searcher(url)
    first.suggest("a")
    again = searcher(url)
    assert [trial.state.name for trial in study(url)] == ["RUNNING", "WAITING"]
    assert [again.suggest(trial_id).get("tcm.margin_pos") for trial_id in "ab"] == [None, 0.9]


def test_no_point_waits_for_a_trial_that_will_not_come(url: str) -> None:
    asked = searcher(url, trials=1)
    asked.suggest("a")
    asked.on_trial_complete("a", figures(0.9, 0.01, ended=True, **BASELINE))
    assert [trial.state.name for trial in study(url)] == ["COMPLETE"]


def test_a_search_goes_on_where_the_study_stands(url: str) -> None:
    """A driver that was killed: what it had not told Optuna is lost with it."""
    before = searcher(url, name="tpe", trials=12)
    points = {trial_id: before.suggest(trial_id) for trial_id in "abcdef"}
    for trial_id in "acde":
        before.on_trial_complete(trial_id, figures(0.9, 0.01, ended=True, **(BASELINE if trial_id == "a" else {})))
    before.on_trial_result("f", figures(0.7, 0.01, epoch=1))

    after = searcher(url, name="tpe", trials=12)
    assert (after.begun, after.left) == (6, 8), "two are lost, six were not asked for"
    assert [after.suggest("b again"), after.suggest("f again")] == [points["b"], points["f"]]
    designed = after.suggest("g")
    assert designed["tcm.margin_pos"] == pytest.approx(0.6), "which the baseline's end had enqueued"
    after.on_trial_result("f again", figures(0.6, 0.01, epoch=1))
    for trial_id in ("b again", "f again"):
        after.on_trial_complete(trial_id, figures(0.90, 0.01, ended=True))
    assert [trial.state.name for trial in study(url)] == ["COMPLETE"] * 6 + ["RUNNING"]
    assert study(url)[5].intermediate_values == {1: pytest.approx(0.6)}
    assert study(url)[5].constraints == {"recall@1": pytest.approx(-0.005)}, "against the baseline's Recall@1"
    assert [outcome.state for outcome in after.outcomes()] == ["finished"] * 6 + ["unfinished"]
    assert after.outcomes()[1].settings["tcm.margin_pos"] == 0.9


def test_margins_are_designed_though_the_driver_died_as_the_baseline_ended(url: str) -> None:
    before = searcher(url, design=False)
    before.suggest("a")
    before.on_trial_complete("a", figures(0.9, 0.01, ended=True, **BASELINE))
    after = searcher(url)
    found = [after.suggest(trial_id)["tcm.margin_pos"] for trial_id in "bc"]
    assert found == pytest.approx([0.9, 0.6])


def test_when_the_first_trials_all_fail_no_more_are_suggested(url: str) -> None:
    asked = searcher(url, hopeless=2)
    for trial_id in "ab":
        asked.suggest(trial_id)
        asked.failed(trial_id, f"DataError: {trial_id} is unreadable")
    assert asked.given_up
    assert asked.suggest("c") == "FINISHED"
    assert [(outcome.state, outcome.error) for outcome in asked.outcomes()] == [
        ("failed", "DataError: a is unreadable"),
        ("failed", "DataError: b is unreadable"),
    ]
    assert searcher(url, hopeless=2).given_up, "whoever asks"
    again = searcher(url, hopeless=3)
    again.suggest("c")
    again.on_trial_complete("c", figures(0.9, 0.01, ended=True))
    again.suggest("d")
    again.failed("d", "DataError")
    assert not again.given_up, "one that succeeded shows that the others may"


def test_what_tune_keeps_holds_no_password_and_does_not_grow(url: str) -> None:
    asked = searcher(url, trials=100)
    sizes = []
    for number in range(40):
        asked.suggest(str(number))
        asked.on_trial_complete(str(number), figures(0.9, 0.01, ended=True))
        sizes.append(len(pickle.dumps(asked)))
    assert url.encode() not in pickle.dumps(asked)
    assert sizes[-1] <= sizes[5] + 100


def test_after_ctrl_c_a_search_goes_on_with_the_trials_that_had_not_ended(
    tmp_path: Path, url: str, ray_local: None
) -> None:
    left, ran = tmp_path / "left", tmp_path / "ran"

    def train(params: dict[str, Any]) -> None:
        import ray.tune

        with ran.open("a") as file:
            file.write(f"{params['number']} ")
        report = {"epoch": 1, "best/recall@1": 0.9, "best/opis": 0.01, "best/score": 0.8}
        ray.tune.report(report)
        ray.tune.report({**report, "epoch": 8})
        ray.tune.report({**report, "epoch": 8, "ended": True})

    class Leave(FIFOScheduler):
        """A driver that gets Ctrl-C while trial 3 runs."""

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            if trial.config["number"] == 3 and not left.exists():
                left.touch()
                signal.raise_signal(signal.SIGINT)
            return str(super().on_trial_result(tune_controller, trial, result))

    outcomes = bench(tmp_path, train).search(searcher(url, trials=6), Leave())
    assert [outcome.state for outcome in outcomes] == ["finished"] * 3 + ["unfinished"]
    assert [trial.state.name for trial in study(url)] == ["COMPLETE"] * 3 + ["RUNNING"]

    outcomes = bench(tmp_path, train).search(searcher(url, trials=6), Leave())
    assert [(outcome.number, outcome.state) for outcome in outcomes] == [(n, "finished") for n in range(6)]
    assert [trial.state.name for trial in study(url)] == ["COMPLETE"] * 6
    assert ran.read_text().split() == ["0", "1", "2", "3", "3", "4", "5"]


def test_a_trial_whose_process_is_lost_is_begun_again_and_one_that_is_lost_always_fails(
    tmp_path: Path, url: str, ray_local: None
) -> None:
    tries = tmp_path / "tries"

    def train(params: dict[str, Any]) -> None:
        import os
        import signal

        import ray.tune

        number = params["number"]
        with tries.open("a") as file:
            file.write(f"{number} ")
        if number == 1 or (number == 0 and tries.read_text().split().count("0") == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        report = {"epoch": 1, "best/recall@1": 0.9, "best/opis": 0.01, "best/score": 0.8, "ended": True}
        ray.tune.report(report)

    outcomes = bench(tmp_path, train).search(searcher(url, trials=2), FIFOScheduler())
    assert [outcome.state for outcome in outcomes] == ["finished", "failed"]
    assert tries.read_text().split().count("0") == 2
    assert tries.read_text().split().count("1") == 1 + RETRIES
    assert [trial.state.name for trial in study(url)] == ["COMPLETE", "FAIL"]
    assert "its worker process has died" in outcomes[1].error


def test_given_trials_are_run_as_they_are(tmp_path: Path, ray_local: None) -> None:
    points: list[Point] = [
        {"number": number, "tcm.margin_pos": 0.8, "train.seed": seed} for seed in (1, 2) for number in (0, 2)
    ]
    outcomes = bench(tmp_path, at_once=2).run(points)
    assert {outcome.state for outcome in outcomes} == {"finished"}
    ran = sorted((outcome.number, outcome.settings["train.seed"]) for outcome in outcomes)
    assert ran == [(0, 1), (0, 2), (2, 1), (2, 2)]

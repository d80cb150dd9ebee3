"""Samplers on a made-up search: they heed the constraint, and learn more than chance does."""

from statistics import fmean

import optuna
import pytest

from dml import recipes
from tune import sampler
from tune.space import Space

RECIPE = recipes.digits("short")


def hill(trial: optuna.Trial) -> float:
    """Best at margins 0.8 and 0.4 and weight 0.1."""
    if trial.params["tcm"] == "off":
        return 0.5
    margin, ratio = trial.params["tcm.margin_pos"], trial.params["margin_ratio"]
    return float(1 - (margin - 0.8) ** 2 - (ratio - 0.5) ** 2 - abs(trial.params["tcm.start"] - 0.2))


def best(name: sampler.SamplerName, seed: int, trials: int = 16) -> float:
    space = Space.of(["tcm.weight=[0.1]"], RECIPE, flat=name in sampler.FLAT)
    study = optuna.create_study(sampler=sampler.build(name, seed=seed, trials=trials), direction="maximize")
    study.enqueue_trial(space.first_points()[0])
    for _ in range(trials):
        trial = study.ask()
        space.suggest(trial)
        study.tell(trial, hill(trial))
    return float(study.best_value)


@pytest.mark.parametrize("name", ["tpe", pytest.param("gp", marks=pytest.mark.slow)])
def test_a_model_of_the_space_beats_chance(name: sampler.SamplerName) -> None:
    assert sum(best(name, seed) for seed in range(2)) > sum(best("random", seed) for seed in range(2))


@pytest.mark.parametrize("name", ["tpe", pytest.param("gp", marks=pytest.mark.slow), "nsga2"])
def test_samplers_turn_away_from_where_the_constraint_is_broken(name: sampler.SamplerName) -> None:
    """The value grows with margin_pos; a constraint that is broken beyond 0.6 holds the later trials back."""
    space = Space.of(["tcm.weight=[0.1]", "tcm.start=[0]"], RECIPE, flat=name in sampler.FLAT)

    def later(bound: float) -> float:
        study = optuna.create_study(sampler=sampler.build(name, seed=0, trials=20), direction="maximize")
        study.enqueue_trial(space.first_points()[0])
        margins = []
        for _ in range(20):
            trial = study.ask()
            space.suggest(trial)
            margins.append(float(trial.params.get("tcm.margin_pos", 0.4)))
            trial.set_constraint("recall@1", margins[-1] - bound)
            study.tell(trial, margins[-1])
        return fmean(margins[10:])

    assert later(bound=0.6) < later(bound=1.0) - 0.1


def test_tcm_off_is_sampled_only_where_it_is_worth_a_trial() -> None:
    for search_off, expected in ((False, {"on"}), (True, {"on", "off"})):
        study = optuna.create_study(sampler=sampler.build("random", seed=0, trials=8, search_off=search_off))
        seen = set()
        for _ in range(20):
            seen.add(study.ask().suggest_categorical("tcm", ["off", "on"]))
        assert seen == expected

"""The search space: the baseline first, margins in order, and no second baseline."""

import optuna

from dml.config import Config
from tune import space


def ask(count: int, seed: int = 0) -> list[dict[str, float | str]]:
    study = optuna.create_study(sampler=space.sampler(seed, startup=4), direction="maximize")
    for point in space.FIRST_POINTS:
        study.enqueue_trial(point)
    asked = []
    for _ in range(count):
        trial = study.ask()
        constants = space.suggest(trial)
        study.tell(trial, trial.params.get("tcm.weight", 0.0))
        asked.append({**trial.params, **constants})
    return asked


def test_the_first_trial_is_the_baseline_and_the_only_one_without_tcm() -> None:
    asked = ask(20)
    assert [params["tcm"] for params in asked] == ["off"] + ["on"] * 19
    assert asked[0]["tcm.weight"] == 0.0
    assert [params["number"] for params in asked] == list(range(20))


def test_every_point_is_a_valid_setting() -> None:
    for params in ask(50):
        settings = {name: value for name, value in params.items() if name.startswith("tcm.")}
        tcm = Config().replace(**settings).tcm
        assert tcm.margin_neg <= tcm.margin_pos
        assert params["tcm"] == "off" or 0.01 <= tcm.weight <= 1.0


def test_the_sampler_is_seeded() -> None:
    assert ask(8, seed=1) == ask(8, seed=1)
    assert ask(8, seed=1) != ask(8, seed=2)

"""The search space: the baseline first, margins in order, and every point a valid setting."""

import optuna
import pytest

from dml import recipes
from dml.config import Config
from tune import sampler
from tune.space import Point, Space, settings

RECIPE = recipes.digits("short")
NT_XENT = RECIPE.replace(**{"loss.name": "nt_xent"})


def ask(space: Space, count: int, seed: int = 0, name: sampler.SamplerName = "tpe") -> list[Point]:
    """Parameters of so many trials, as a trainable gets them."""
    chosen = sampler.build(name, seed=seed, trials=count, search_off=bool(space.others))
    study = optuna.create_study(sampler=chosen, direction="maximize")
    for point in space.first_points():
        study.enqueue_trial(point)
    asked: list[Point] = []
    for _ in range(count):
        trial = study.ask()
        derived = space.suggest(trial)
        asked.append({**trial.params, **derived})
        study.tell(trial, float(str(trial.params.get("tcm.margin_pos", 0.0))))
    return asked


@pytest.mark.parametrize("name", ["tpe", "random", "gp", "nsga2"])
def test_the_first_trial_is_the_baseline_and_the_only_one_without_tcm(name: sampler.SamplerName) -> None:
    space = Space.of([], RECIPE, flat=name in sampler.FLAT)
    asked = ask(space, 12, name=name)
    assert [params["tcm"] for params in asked] == ["off"] + ["on"] * 11
    assert [params["number"] for params in asked] == list(range(12))
    assert settings(asked[0]) == {"tcm.weight": 0.0}
    paper = settings(asked[1])
    assert (paper["tcm.margin_pos"], paper["tcm.margin_neg"]) == (0.9, 0.5)


def test_every_point_is_a_valid_setting_and_the_margins_keep_their_order() -> None:
    space = Space.of(["tcm.margin_pos=uniform(0.1,1)", "optim.lr=log(1e-5,1e-3)", "batch.classes=int(2,6)"], RECIPE)
    asked = ask(space, 60)
    for params in asked:
        config = RECIPE.replace(**settings(params))
        assert config.tcm.margin_neg < config.tcm.margin_pos
        assert (config.tcm.weight == 0) == (params["tcm"] == "off")
        assert 1e-5 <= config.optim.lr <= 1e-3
    assert {params["tcm"] for params in asked[1:]} == {"off", "on"}, "a fair baseline is searched too"


def test_the_baseline_keeps_to_the_recipe_where_it_lies_outside_the_space() -> None:
    space = Space.of(["encoder.dim=[128,512]", "optim.lr=log(1e-4,1e-2)"], RECIPE)
    baseline, *others = ask(space, 6)
    assert settings(baseline) == {"optim.lr": RECIPE.optim.lr, "tcm.weight": 0.0}, "the recipe's dim is 64"
    assert all(params["encoder.dim"] in (128, 512) for params in others)


@pytest.mark.parametrize("name", sampler.FLAT)
def test_a_sampler_that_knows_no_conditions_models_what_the_recipe_lies_outside_of(name: sampler.SamplerName) -> None:
    """Those model only what every trial has, the baseline included; it keeps to the recipe all the same."""
    words = ["encoder.dim=[128,512]", "optim.lr=log(1e-5,1e-4)", "loss.temperature=uniform(0.01,0.1)"]
    assert not NT_XENT.loss.options, "the temperature is left to the loss"
    space = Space.of(words, NT_XENT, flat=True)
    study = optuna.create_study(sampler=sampler.build(name, seed=0, trials=4, search_off=True))
    study.enqueue_trial(space.first_points()[0])
    asked = []
    for _ in range(3):
        trial = study.ask()
        derived = space.suggest(trial)
        asked.append(settings({**trial.params, **derived}))
        study.tell(trial, 1.0)
    assert NT_XENT.replace(**asked[0]) == NT_XENT.replace(**{"tcm.weight": 0.0})
    assert {*space.others} <= asked[1].keys()
    modelled = optuna.search_space.intersection_search_space(study.get_trials())
    assert {*space.others, *space.tcm} <= modelled.keys()
    assert study.trials[0].params["optim.lr"] == 1e-4, "the nearest to the recipe's 0.001"


def test_the_samplers_are_seeded() -> None:
    space = Space.of(["optim.lr=log(1e-4,1e-2)"], RECIPE)
    for name in ("tpe", "random"):
        assert ask(space, 8, seed=1, name=name) == ask(space, 8, seed=1, name=name)
        assert ask(space, 8, seed=1, name=name) != ask(space, 8, seed=2, name=name)


def test_an_option_of_the_loss_may_be_named_short() -> None:
    for name in ("loss.temperature", "loss.options.temperature"):
        space = Space.of([f"{name}=uniform(0.01,0.1)"], NT_XENT)
        assert list(space.others) == ["loss.options.temperature"]
        assert NT_XENT.replace(**settings(ask(space, 3)[2])).loss.options.keys() == {"temperature"}


def test_none_is_a_value_or_the_word_as_the_setting_has_it() -> None:
    space = Space.of(["optim.projection_lr=[none,0.1]", "data.augment=[none,affine]"], RECIPE)
    assert space.others["optim.projection_lr"].samples() == (None, 0.1)
    assert space.others["data.augment"].samples() == ("none", "affine")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lrr=log(1e-5,1e-3)"], "unknown setting 'optim.lrr'; valid: optim.lr, "),
        (["lr=log(1e-5,1e-3)"], "unknown setting 'lr'; valid: "),
        (["optim.lr=uniform(-1,1)"], "optim.lr -1.0 is refused: Input should be greater than 0"),
        (["tcm.margin_pos=uniform(0.5,1.5)"], "tcm.margin_pos 1.5 is refused: Input should be less than or equal to 1"),
        (["batch.classes=uniform(16,64)"], "a valid integer, got a number with a fractional part; int(low,high)"),
        (["optim.name=[adam,sgdd]"], "optim.name sgdd is refused: Input should be 'adamw', 'adam' or 'sgd'"),
        (
            ["loss.name=[contrastive,contrastiv]"],
            "contrastiv is refused: unknown loss 'contrastiv'; valid: contrastive",
        ),
        (
            ["loss.temperature=uniform(0.01,0.1)"],
            "unknown setting of loss multi_similarity 'loss.temperature'; valid: ",
        ),
        (["loss.options.temperatur=uniform(0.01,0.1)"], "unknown option of loss multi_similarity 'temperatur'"),
        (["optim.lr=log(1e-5,1e-3)", "optim.lr=log(1e-4,1e-3)"], "--space optim.lr is given twice"),
        (["tcm.margin_neg=uniform(0.1,0.6)"], "can reach tcm.margin_pos=uniform(0.4,0.95)"),
        (["tcm.margin_neg=[0.1,0.5]", "tcm.margin_pos=[0.5,0.9]"], "can reach tcm.margin_pos=[0.5,0.9]"),
        (["data.split_seed=int(0,9)"], "trials would not see the same classes"),
        (["evaluate.far_max=uniform(0.05,0.2)"], "trials would not be judged by the same figures"),
        (["train.seed=int(0,9)"], "--seeds trains the finalists over several"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_searched_is_named(words: list[str], message: str) -> None:
    with pytest.raises((ValueError, KeyError)) as error:
        Space.of(words, RECIPE)
    assert message in error.value.args[0]


def test_a_range_of_margin_neg_below_that_of_margin_pos_is_taken_as_it_is() -> None:
    space = Space.of(["tcm.margin_neg=uniform(-0.2,0.3)"], RECIPE)
    assert [*space.tcm] == ["tcm.margin_pos", "tcm.weight", "tcm.start", "tcm.margin_neg"]
    assert len(space.first_points()) == 1, "the paper's 0.5 is no point of it"
    for params in ask(space, 20)[1:]:
        assert -0.2 <= float(str(params["tcm.margin_neg"])) <= 0.3


def reported(far_min: float, far_max: float, frr_max: float) -> dict[str, float]:
    return {
        "val/similarity_at_far_min": far_min,
        "val/similarity_at_far_max": far_max,
        "val/similarity_at_frr_max": frr_max,
    }


def margins(space: Space, baseline: dict[str, float]) -> tuple[float, float]:
    """The margins that a search tries after such a baseline."""
    point = space.designed(baseline)
    assert point is not None
    study = optuna.create_study()
    study.enqueue_trial(point)
    trial = study.ask()
    derived = space.suggest(trial)
    found = settings({**trial.params, **derived})
    return float(str(found["tcm.margin_pos"])), float(str(found["tcm.margin_neg"]))


def test_margins_are_designed_from_the_baseline() -> None:
    space = Space.of([], RECIPE)
    assert margins(space, reported(0.6, 0.3, 0.4)) == pytest.approx((0.6, 0.3)), "a weak baseline: the range's ends"
    assert margins(space, reported(0.4, 0.2, 0.7)) == pytest.approx((0.7, 0.2)), "a good one: the worst positives"
    assert margins(space, reported(0.3, -0.1, 0.2)) == pytest.approx((0.4, 0.0)), "the nearest point of the space"


def test_no_margins_are_designed_from_a_collapsed_or_silent_baseline() -> None:
    space = Space.of([], RECIPE)
    assert space.designed(reported(1.0, 1.0, 1.0)) is None
    assert space.designed({"best/score": 0.5}) is None


def test_a_grid_is_every_combination_in_a_drawn_order() -> None:
    space = Space.of(["tcm.start=[0]", "tcm.weight=log(0.01,1)", "encoder.dim=[32,64]"], RECIPE)
    points = space.grid(3, seed=0)
    assert len(points) == space.grid_size(3) == 3 * 3 * 3 * 1 * 2
    assert len({tuple(point.items()) for point in points}) == len(points)
    assert points == space.grid(3, seed=0)
    assert points != space.grid(3, seed=1)
    assert {point["tcm"] for point in points} == {"on"}
    assert sorted({float(str(point["tcm.weight"])) for point in points}) == pytest.approx([0.01, 0.1, 1])


def test_the_recipe_itself_is_not_changed() -> None:
    with_tcm = Config().replace(**{"tcm.weight": 0.5})
    assert Space.of([], with_tcm).config.tcm.weight == 0
    assert with_tcm.tcm.weight == 0.5

"""Settings refuse what they do not know, and a recipe is a Config with a few fields changed."""

import pydantic
import pytest

from dml import recipes
from dml.config import Config
from dml.names import unknown


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(pydantic.ValidationError, match="Extra inputs are not permitted"):
        Config.model_validate({"optim": {"learning_rate": 1}})


def test_settings_cannot_be_changed_in_place() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Config().optim.lr = 1.0  # type: ignore[misc]


def test_replace_changes_dotted_fields_and_validates_them() -> None:
    changed = Config().replace(**{"optim.lr": 0.5, "loss.options.alpha": 3.0})
    assert changed.optim.lr == 0.5
    assert changed.flat["loss.options.alpha"] == 3.0
    assert Config().optim.lr != 0.5
    with pytest.raises(KeyError, match=r"unknown setting 'optim[.]lrr'; valid: optim[.]lr"):
        Config().replace(**{"optim.lrr": 1})
    with pytest.raises(pydantic.ValidationError, match="greater than 0"):
        Config().replace(**{"optim.lr": -1})


@pytest.mark.parametrize("name", ["optim.lr.x", "loss.options.alpha.x", "optimiser.lr"])
def test_a_name_below_a_setting_or_an_unknown_section_is_answered_with_the_nearest(name: str) -> None:
    config = Config().replace(**{"loss.options.alpha": 3.0})
    with pytest.raises(KeyError, match=rf"unknown setting '{name}'; valid: (optim[.]|loss[.]options[.]alpha)"):
        config.replace(**{name: 1})


@pytest.mark.parametrize("name", ["optim.clip", "data.std", "evaluate.utility_c", "tcm.weight", "loss.options.alpha"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_are_finite_since_a_checkpoint_could_not_hold_others(name: str, value: float) -> None:
    with pytest.raises(pydantic.ValidationError, match=rf"{name}\n  Input should be a finite number"):
        Config().replace(**{name: value})


def test_margins_must_be_in_order() -> None:
    with pytest.raises(pydantic.ValidationError, match=r"margin_neg \(0.8\) must not exceed margin_pos \(0.7\)"):
        Config().replace(**{"tcm.margin_pos": 0.7, "tcm.margin_neg": 0.8})


def test_one_sample_a_class_is_only_for_losses_without_positives() -> None:
    one = {"batch.samples": 1}
    with pytest.raises(pydantic.ValidationError, match=r"loss multi_similarity needs positives.* one of proxy_anchor"):
        Config().replace(**one)
    assert Config().replace(**one, **{"loss.name": "proxy_anchor"}).batch.samples == 1
    assert Config().replace(**one, **{"loss.name": "elsewhere:Loss"}).batch.samples == 1, "nothing is imported to ask"
    assert Config().replace(**one, **{"batch.sampler": "random"}).batch.samples == 1, "there, K says nothing of classes"


def test_a_memory_is_only_for_losses_that_take_one() -> None:
    with pytest.raises(pydantic.ValidationError, match=r"loss proxy_anchor takes none; valid: .*triplet"):
        Config().replace(**{"memory.size": 64, "loss.name": "proxy_anchor"})
    assert Config().replace(**{"memory.size": 64, "loss.name": "triplet"}).memory.size == 64


@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_a_recipe_survives_json_and_its_short_budget_is_shorter(name: str) -> None:
    full, short = recipes.build(name), recipes.build(name, "short")
    assert Config.model_validate_json(full.model_dump_json()) == full
    assert short.train.epochs < full.train.epochs
    assert short.replace(**{"train.epochs": full.train.epochs, "train.eval_every": full.train.eval_every}) == full


def test_an_unknown_recipe_is_named_with_the_nearest_first() -> None:
    with pytest.raises(ValueError, match="unknown recipe 'glyph'; valid: glyphs, "):
        recipes.build("glyph")


def test_a_long_list_of_valid_names_is_cut() -> None:
    assert unknown("encoder", "x", [f"net{index}" for index in range(100)]).endswith("... (70 more)")

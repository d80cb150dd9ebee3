"""The card of a registered model: true for what is registered, readable, and safe whatever a class is called."""

import dataclasses

import pytest
import torch

from cluster import registry
from dml.checkpoint import Checkpoint
from dml.config import Config
from tune import tested
from tune.model_card import model_card

CONFIG = Config().replace(**{"tcm.weight": 0.1, "tcm.margin_pos": 0.8, "data.split_seed": 3})
METRICS = {
    "test/recall@1": 0.91234,
    "test/opis": 0.0049,
    "test/sqrt_opis": 0.07,
    "test/opis_noise_floor": 0.0004,
    "test/epsilon_opis": 0.02,
    "test/mean_utility": 0.96,
}
POINT = {"far_target": 0.01, "threshold": 0.98765, "distance": "euclidean"}
HELD = {"far": 0.0123, "frr": 0.045, "far_interval": [0.011, 0.014], "frr_interval": None}
TESTED = tested.Tested(
    metrics=METRICS,
    curves=None,
    classes=516,
    operating_points=(POINT,),
    transfers=(HELD,),
    worst=(("lowest", 0.71), ("second", 0.8)),
    sizes={"train": (1032, 9000), "val": (516, 4500), "test": (516, 4400)},
    fingerprint="f" * 64,
)


def card(
    config: Config = CONFIG, found: tested.Tested = TESTED, baseline: tested.Tested | None = None, **info: object
) -> str:
    return model_card("letters", Checkpoint(torch.nn.Identity(), config, {"epoch": 7, **info}), found, baseline)


def test_it_says_what_on_what_how_good_and_where_it_ends() -> None:
    baseline = dataclasses.replace(TESTED, metrics={**METRICS, "test/opis": 0.0065})
    text = card(baseline=baseline)
    for line in (
        "# letters",
        "small_cnn maps 32 x 32 px with 1 channel to unit vectors of 64 dimensions",
        "Loss: multi_similarity, TCM of weight 0.1 with margins 0.8 / 0.5.",
        "glyphs, split by class (split seed 3), fingerprint `ffffffffffffffff`:",
        "| train | 1,032 | 9,000 |",
        "the weights are those of epoch 7, the best on val",
        "| Recall@1 | 0.9123 | 0.9123 |",
        "| OPIS | 0.00490 | 0.00650 |",
        "| 0.01 | 0.9877 | 0.0123 (0.011 to 0.014) | 0.045 |",
        "- `lowest`: 0.710\n- `second`: 0.800",
        "- No threshold for FAR 0.1, 0.001: val has too few pairs to tell it from 0.",
    ):
        assert line in text
    assert "without TCM" not in card()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"toy": True}, "A toy: so few classes"),
        ({"metrics": {**METRICS, "test/opis": 0.0006}}, "OPIS is near its noise floor"),
        ({"worst": ()}, "The embeddings are collapsed"),
        ({"operating_points": (), "transfers": ()}, "the val classes resolve no false accept rate"),
    ],
)
def test_what_a_reader_must_know_is_said_where_it_holds_and_only_there(changes: dict[str, object], words: str) -> None:
    assert words in card(found=dataclasses.replace(TESTED, **changes))  # type: ignore[arg-type]
    assert words not in card()


def test_classes_of_val_that_trained_and_first_weights_are_named_without_anybodys_folders() -> None:
    assert "75% of the val classes joined train" in card(CONFIG.replace(**{"data.train_on_val": 0.75}))
    assert "Its weights started from `models:/letters/3`." in card(init="models:/letters/3")
    text = card(init="s3://key:password@bucket/somebody/step-7")
    assert "Its weights started from `step-7`." in text
    assert "password" not in text


def test_names_of_classes_break_neither_the_markdown_nor_the_database() -> None:
    names = ("`code` | a\n# heading <script>", *("long " * 100 + str(number) for number in range(4)))
    text = card(found=dataclasses.replace(TESTED, worst=tuple((name, 0.5) for name in names)))
    assert "- `'code' / a # heading <script>`: 0.500" in text
    assert "\n# heading" not in text
    assert len(text) < registry.DESCRIPTION

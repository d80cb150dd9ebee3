"""Who beats the champion, on which classes, and when nobody can say: models on the digits, whose labels are known."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from dml import checkpoint, encoders, evaluate, loop
from dml.checkpoint import Checkpoint
from dml.config import Config
from dml.data import datasets
from tune.challenge import Contender, IncomparableError, compare, unseen
from tune.objective import Objective

CPU = torch.device("cpu")
CONFIG = Config().replace(
    **{
        "data.dataset": "digits",
        "data.image_size": 8,
        "data.val_fraction": 0.5,
        "data.test_fraction": 0.2,
        "encoder.dim": 16,
        "batch.classes": 3,
        "batch.samples": 8,
        "train.epochs": 3,
    }
)


def untrained(**changes: object) -> Checkpoint:
    """An encoder of random weights that says which split it is of."""
    config = CONFIG.replace(**changes)
    torch.manual_seed(config.train.seed)
    encoder = encoders.build(config.encoder, channels=1, image_size=8).eval()
    return Checkpoint(encoder, config, {"fingerprint": datasets.load(config.data).fingerprint})


@pytest.fixture(scope="module")
def trained() -> Checkpoint:
    """Trained, unlike any real one, on the val classes themselves, so that on these it is the better one for sure."""
    splits = datasets.load(CONFIG.data)
    *_, last = loop.train(CONFIG, dataclasses.replace(splits, train=splits.val), device=CPU)
    assert isinstance(last, loop.EpochReport)
    return Checkpoint(last.encoder.eval(), CONFIG, {"fingerprint": splits.fingerprint})


def contender(model: Checkpoint, label: str = "model", **changes: object) -> Contender:
    return Contender.of(label, Checkpoint(model.encoder, model.config, {**model.info, **changes}))


def test_classes_count_that_no_side_was_trained_on() -> None:
    sides = [contender(untrained(**{"data.train_on_val": share})) for share in (0.2, 0.6)]
    seen = {
        name
        for side in sides
        for split in ("train", "test")
        for name in getattr(datasets.load(side.model.config.data), split).classes
    }
    assert set(unseen(sides)) == {f"digit {n}" for n in range(10)} - seen
    assert len(unseen(sides)) == 2


def test_both_are_measured_on_these_classes_alone_by_the_challengers_ranges(trained: Checkpoint) -> None:
    champion = untrained(**{"data.train_on_val": 0.4, "evaluate.far_max": 0.5})
    result = compare(contender(trained), contender(champion), Objective(weight=0.5), CPU)
    names = datasets.load(champion.config.data).val.classes
    assert result.classes == len(names) == 3

    val = datasets.load(CONFIG.data).val
    rows = np.array([row for row, label in enumerate(val.labels_N) if val.classes[label] in names])
    expected = []
    for model in (trained, champion):
        embeddings = evaluate.embed(model.encoder, val, model.config, device=CPU)[rows]
        found = evaluate.measure(embeddings, torch.from_numpy(val.labels_N[rows]), CONFIG.evaluate)
        expected.append(found | {"score": found["recall@1"] - 0.5 * found["opis"] ** 0.5})
    assert result.figures == pytest.approx(expected[0], abs=1e-6)
    assert result.champion == pytest.approx(expected[1], abs=1e-6)


@pytest.mark.parametrize("mode", ["combined", "constrained", "pareto"])
def test_the_better_wins_and_an_equal_does_not(trained: Checkpoint, mode: str) -> None:
    better, worse = contender(trained), contender(untrained())
    objective = Objective(mode=mode)
    result = compare(better, worse, objective, CPU)
    assert result.figures["score"] > result.champion["score"]
    assert result.figures["opis"] < result.champion["opis"]
    assert result.won
    assert not compare(worse, better, objective, CPU).won
    assert not compare(better, better, objective, CPU).won


class Scatter(torch.nn.Module):
    """Embeds any two images at random, so that it treats all classes alike and tells none apart."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        weights = torch.randn(images[0].numel(), 16, generator=torch.Generator().manual_seed(0))
        return torch.nn.functional.normalize(torch.sin(1e4 * images.flatten(1) @ weights), dim=1)


def test_opis_is_not_bought_with_recall_beyond_the_tolerance(trained: Checkpoint) -> None:
    alike, champion = contender(Checkpoint(Scatter(), CONFIG, trained.info)), contender(trained)
    result = compare(alike, champion, Objective(mode="constrained", tolerance=0.005), CPU)
    assert result.figures["opis"] < result.champion["opis"]
    assert result.figures["recall@1"] < result.champion["recall@1"] - 0.005
    assert not result.won
    assert compare(alike, champion, Objective(mode="constrained", tolerance=1.0), CPU).won


def test_models_of_two_splits_are_not_compared() -> None:
    one, other = untrained(), untrained(**{"data.split_seed": 1})
    with pytest.raises(IncomparableError, match=r"champion was trained on another split .* may have trained the other"):
        unseen([contender(one), contender(other, "champion")])


def test_a_model_that_does_not_know_its_data_is_not_compared() -> None:
    with pytest.raises(IncomparableError, match="old does not say which data it was trained on"):
        unseen([contender(untrained()), contender(untrained(), "old", fingerprint="")])


def test_data_that_changed_since_are_told() -> None:
    sides = [contender(untrained(), fingerprint="0" * 64) for _ in range(2)]
    with pytest.raises(IncomparableError, match="the data of model have changed since it was trained"):
        unseen(sides)


def test_what_a_model_started_from_counts_too(tmp_path: Path) -> None:
    """A warm start brings what its source learnt: its classes, and in turn those of what that one started from."""
    first = untrained(**{"data.train_on_val": 0.6})
    checkpoint.save(tmp_path / "first", first.encoder, first.config, info=first.info)
    between = untrained()
    checkpoint.save(
        tmp_path / "second", between.encoder, between.config, info={**between.info, "init": str(tmp_path / "first")}
    )
    child, champion = contender(untrained(), init=str(tmp_path / "second")), contender(untrained())
    assert set(unseen([child, champion])) == set(datasets.load(first.config.data).val.classes)
    assert len(unseen([champion])) == 5

    elsewhere = untrained(**{"data.split_seed": 1})
    checkpoint.save(tmp_path / "elsewhere", elsewhere.encoder, elsewhere.config, info=elsewhere.info)
    with pytest.raises(IncomparableError, match="elsewhere was trained on another split"):
        unseen([contender(untrained(), init=str(tmp_path / "elsewhere")), champion])
    with pytest.raises(IncomparableError, match=r"challenger started from .*gone, which cannot be read"):
        contender(untrained(), "challenger", init=str(tmp_path / "gone"))

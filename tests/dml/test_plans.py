"""Plans of whole trainings: when the encoder is asked, what is kept, and that a checkpoint carries it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dml import checkpoint, encoders, loop, recipes
from dml import evaluate as evaluation
from dml.config import Config
from dml.data import datasets, sampler
from dml.plans import Plans
from dml.state import Progress, State

CPU = torch.device("cpu")
CONFIG = recipes.digits("short").replace(
    **{
        "batch.sampler": "greedy_coreset",
        "batch.classes": 4,
        "batch.samples": 3,
        "batch.candidates": 3,
        "train.epochs": 2,
        "train.steps_per_epoch": 3,
    }
)
TRAIN = datasets.load(CONFIG.data).train


def encoder(seed: int = 0) -> encoders.Encoder:
    torch.manual_seed(seed)
    return encoders.build(CONFIG.encoder, channels=1, image_size=16)


def plans(config: Config, model: encoders.Encoder) -> Plans:
    return Plans(model, TRAIN, config, 3, device=CPU, group=None)


def test_a_plain_sampler_follows_from_the_seed_and_stores_nothing() -> None:
    config = CONFIG.replace(**{"batch.sampler": "spc"})
    made = plans(config, encoder())
    for number in (0, 1, 5):
        expected = sampler.plan(TRAIN.labels_N, config.batch, seed=0, epoch=number, steps=3)
        np.testing.assert_array_equal(made.epoch(number), expected)
    assert made.stored is None


@pytest.mark.parametrize("name", sorted(sampler.EMBEDDING_DRIVEN))
def test_the_plan_is_the_samplers_with_the_encoders_embeddings(name: str) -> None:
    config = CONFIG.replace(**{"batch.sampler": name})
    model = encoder()
    everyone = evaluation.embed(model, TRAIN, config, device=CPU)
    expected = sampler.plan(TRAIN.labels_N, config.batch, seed=0, epoch=4, steps=3, embed=lambda rows: everyone[rows])
    np.testing.assert_array_equal(plans(config, model).epoch(4), expected)
    assert not np.array_equal(plans(config, encoder(1)).epoch(4), expected), "another encoder chooses others"


def test_the_encoder_is_asked_every_so_many_epochs() -> None:
    model = encoder()
    asked: list[int] = []
    model.register_forward_hook(lambda *_: asked.append(1))
    made = plans(CONFIG.replace(**{"batch.embed_every": 3}), model)
    epochs = []
    counts = []
    for number in range(5):
        epochs.append(made.epoch(number))
        counts.append(len(asked))
    assert 0 < counts[0] == counts[1] == counts[2] < counts[3] == counts[4]
    assert len({epoch.tobytes() for epoch in epochs}) == 5
    assert made.stored is not None
    assert made.stored.shape == (9, 12)
    np.testing.assert_array_equal(made.stored[3:6], epochs[4])


def test_planning_leaves_the_encoder_in_training_mode() -> None:
    model = encoder().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plans(CONFIG, model).epoch(0)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_stored_plan_is_taken_up_whatever_the_encoder_has_become(tmp_path: Path) -> None:
    config = CONFIG.replace(**{"batch.embed_every": 2})
    first = plans(config, encoder())
    whole = [first.epoch(number) for number in (2, 3)]
    assert first.stored is not None
    state = State(config, Progress(step=0), {"plan": {"plan": torch.from_numpy(first.stored)}})
    checkpoint.save(tmp_path / "last", encoder(), config, info={}, state=state)
    stored = checkpoint.load_state(tmp_path / "last").parts["plan"]["plan"].numpy()
    again = plans(config, encoder(1))
    again.restore(stored, 2)
    for number, expected in zip((2, 3), whole, strict=True):
        np.testing.assert_array_equal(again.epoch(number), expected)
    with pytest.raises(ValueError, match=r"shape \(6, 12\), but this config plans \(3, 12\)"):
        plans(CONFIG, encoder()).restore(stored, 2)


def test_embeddings_that_are_no_numbers_are_refused_in_words() -> None:
    model = encoder()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(ArithmeticError, match=r"108 of 108 training images have embeddings that are NaN .* optim\.lr"):
        plans(CONFIG, model).epoch(0)


@pytest.mark.parametrize("name", sorted(sampler.SAMPLERS))
def test_every_sampler_trains_and_the_report_carries_what_is_stored(name: str) -> None:
    config = CONFIG.replace(**{"batch.sampler": name})
    events = list(loop.train(config, datasets.load(config.data), device=CPU))
    reports = [event for event in events if isinstance(event, loop.EpochReport)]
    assert [report.epoch for report in reports] == [1, 2]
    if name in sampler.EMBEDDING_DRIVEN:
        first, second = (report.state.parts["plan"]["plan"] for report in reports)
        assert first.shape == second.shape == (3, 12)
        assert not torch.equal(first, second)
    else:
        assert not any("plan" in report.state.parts for report in reports)

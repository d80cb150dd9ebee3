"""The moving average of weights: its formula, its start, and a training that evaluates and keeps it."""

from pathlib import Path

import pytest
import torch

from dml import checkpoint, encoders, loop, recipes
from dml.config import EncoderConfig
from dml.data import datasets
from dml.ema import EMA


def encoder() -> encoders.Encoder:
    return encoders.build(EncoderConfig(name="resnet10t", dim=4), channels=1, image_size=32)


def test_it_is_the_formula_and_follows_closely_at_first() -> None:
    trained = encoder()
    ema = EMA(trained, decay=0.5)
    expected = trained.projection.bias.detach().double()
    for update in range(20):
        trained.projection.bias.data += 1.0
        ema.update(trained)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * trained.projection.bias.detach().double()
    torch.testing.assert_close(ema.encoder.projection.bias.double(), expected, rtol=1e-6, atol=1e-6)
    assert ema.updates == 20


def test_statistics_are_averaged_and_counters_taken_over() -> None:
    trained = encoder()
    ema = EMA(trained, decay=0.9)
    (layer, *_), (average, *_) = encoders.batch_norms(trained), encoders.batch_norms(ema.encoder)
    layer.running_mean.fill_(10.0)
    layer.num_batches_tracked.fill_(7)
    ema.update(trained)
    assert average.running_mean[0] == pytest.approx(9.0), "the first decay is 1 / 10"
    assert average.num_batches_tracked == 7


def test_the_average_has_its_own_weights_without_gradients_in_evaluation_mode() -> None:
    trained = encoder()
    ema = EMA(trained, decay=0.9)
    assert not ema.encoder.training
    assert not any(parameter.requires_grad for parameter in ema.encoder.parameters())
    own = {parameter.data_ptr() for parameter in ema.encoder.parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in trained.parameters())
    assert trained.training
    with pytest.raises(ValueError, match=r"decay is in \[0, 1\), got 1"):
        EMA(trained, decay=1.0)


def test_a_training_evaluates_and_keeps_the_average_and_trains_as_without(tmp_path: Path) -> None:
    config = recipes.digits("short").replace(**{"train.epochs": 1, "train.steps_per_epoch": 20, "optim.ema": 0.9})
    splits = datasets.load(config.data)
    *steps, last = loop.train(config, splits, device=torch.device("cpu"))
    *plain_steps, plain = loop.train(config.replace(**{"optim.ema": 0.0}), splits, device=torch.device("cpu"))
    assert [step.metrics["train/loss"] for step in steps] == [step.metrics["train/loss"] for step in plain_steps]
    assert last.metrics["val/score"] != plain.metrics["val/score"]
    assert last.metrics["val/recall@1"] > 0.9
    checkpoint.save(tmp_path / "kept", last.encoder, config, info={})
    kept = checkpoint.load(tmp_path / "kept").encoder.state_dict()
    for name, value in plain.encoder.state_dict().items():
        assert not torch.equal(kept[name], value), name
        assert torch.equal(kept[name], last.encoder.state_dict()[name]), name

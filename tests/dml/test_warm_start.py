"""A training that starts from the encoder of another: its weights, nothing of its classes, and only where they fit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dml import checkpoint, loop, recipes
from dml.data import datasets

CPU = torch.device("cpu")
CONFIG = recipes.digits("short").replace(
    **{"data.image_size": 8, "encoder.dim": 16, "train.epochs": 1, "train.steps_per_epoch": 3}
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> checkpoint.Checkpoint:
    path: Path = tmp_path_factory.mktemp("warm") / "model"
    config = CONFIG.replace(**{"loss.name": "proxy_anchor"})
    *_, last = loop.train(config, datasets.load(config.data), device=CPU)
    assert isinstance(last, loop.EpochReport)
    checkpoint.save(path, last.encoder, config, info={}, state=last.state)
    return checkpoint.load(path)


def test_other_classes_train_on_from_the_encoders_weights(model: checkpoint.Checkpoint) -> None:
    """At a rate of almost nothing they end where they began; the proxies are those of a new training."""
    config = CONFIG.replace(**{"loss.name": "proxy_anchor", "data.split_seed": 1, "optim.lr": 1e-30, "optim.ema": 0.9})
    config = config.replace(**{"optim.loss_lr": 1e-30, "optim.weight_decay": 0.0})
    splits = datasets.load(config.data)
    init = checkpoint.warm_start(model, config)
    *_, warm = loop.train(config, splits, device=CPU, init=init)
    *_, cold = loop.train(config, splits, device=CPU)
    assert isinstance(warm, loop.EpochReport)
    assert isinstance(cold, loop.EpochReport)
    for name, value in model.encoder.state_dict().items():
        torch.testing.assert_close(warm.encoder.state_dict()[name], value, rtol=1e-6, atol=1e-8)
        if value.ndim > 1:
            assert not torch.equal(cold.encoder.state_dict()[name], value)
    for name, value in cold.state.parts["loss"].items():
        torch.testing.assert_close(warm.state.parts["loss"][name], value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.dim": 32}, "small_cnn, channels 1, dim 16; this training's is small_cnn, channels 1, dim 32"),
        ({"encoder.name": "test_resnet"}, "is small_cnn, .*; this training's is test_resnet, channels 1, dim 16"),
        ({"data.channels": 3}, "is small_cnn, channels 1, .*; this training's is small_cnn, channels 3, dim 16"),
    ],
)
def test_another_encoder_is_refused_naming_both(
    model: checkpoint.Checkpoint, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint.warm_start(model, CONFIG.replace(**changes))


def test_another_image_size_is_refused_where_the_architecture_depends_on_it() -> None:
    from dml import encoders

    at = {size: CONFIG.replace(**{"encoder.name": "test_vit", "data.image_size": size}) for size in (32, 160)}
    built = encoders.build(at[160].encoder, channels=1, image_size=160)
    with pytest.raises(
        ValueError, match=r"pos_embed has shape .* \(data.image_size 160\), but .* \(data.image_size 32\)"
    ):
        checkpoint.warm_start(checkpoint.Checkpoint(built, at[160], {}), at[32])

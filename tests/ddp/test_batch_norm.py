"""BatchNorm over ranks: one encoder for all of them, whatever part of the batch each has seen."""

from typing import Any

import pytest
import torch

from dml import loop, recipes
from dml.data import datasets
from tests.ddp import ranks

CONFIG = recipes.digits("short").replace(
    **{
        "data.image_size": 8,
        "encoder.name": "resnet10t",
        "train.epochs": 1,
        "train.steps_per_epoch": 3,
        "train.log_every": 1,
        "optim.name": "sgd",
    }
)


def trained(rank: int, world: int, batch_norm: str) -> tuple[list[float], list[float]]:
    """Losses, and all statistics, summed layer by layer."""
    config = CONFIG.replace(**{"encoder.batch_norm": batch_norm})
    *steps, last = loop.train(config, datasets.load(config.data), device=torch.device("cpu"))
    assert isinstance(last, loop.EpochReport)
    statistics: Any = [float(buffer.double().sum()) for buffer in last.encoder.buffers()]
    return [event.metrics["train/loss"] for event in steps], statistics


def test_ranks_report_an_encoder_with_one_set_of_statistics() -> None:
    (_, first), (_, second) = ranks.run(2, trained, "batch")
    assert first == second


def test_with_frozen_statistics_two_ranks_train_as_one_process_does() -> None:
    losses, statistics = trained(0, 1, "frozen")
    for rank_losses, rank_statistics in ranks.run(2, trained, "frozen"):
        assert rank_losses == pytest.approx(losses, rel=1e-4)
        assert rank_statistics == statistics


def averaged(rank: int, world: int) -> tuple[list[float], list[float]]:
    """Sums of weights and statistics of the moving average."""
    config = CONFIG.replace(**{"optim.ema": 0.5})
    *_, last = loop.train(config, datasets.load(config.data), device=torch.device("cpu"))
    assert isinstance(last, loop.EpochReport)
    tensors = [*last.encoder.parameters()], [*last.encoder.buffers()]
    weights, statistics = ([float(tensor.double().sum()) for tensor in kind] for kind in tensors)
    return weights, statistics


def test_ranks_report_one_moving_average() -> None:
    first, second = ranks.run(2, averaged)
    assert first == second

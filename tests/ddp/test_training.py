"""W ranks train on what one would: same batches, same augmentation, same gradients, same evaluation."""

from typing import Any

import pytest
import torch

from dml import loop, recipes
from dml.data import datasets
from tests.ddp import ranks

CONFIG = recipes.digits("short").replace(
    **{"train.epochs": 1, "train.steps_per_epoch": 12, "train.log_every": 1, "tcm.weight": 0.1, "optim.lr": 1e-3}
)


RUNS: dict[str, dict[str, Any]] = {
    "multi_similarity": {"loss.name": "multi_similarity"},
    "proxy_anchor": {"loss.name": "proxy_anchor"},
    "thaw": {"optim.frozen_backbone": 0.5, "optim.schedule": "step", "optim.projection_lr": 3e-3},
    # Its miner thresholds nothing, so that rounding decides no tuple.
    "margin": {"loss.name": "margin", "loss.miner": "random", "loss.rho": 0.3, "memory.size": 100, "memory.start": 0.1},
}


def train(run: str) -> tuple[list[float], dict[str, float]]:
    config = CONFIG.replace(**RUNS[run])
    events = list(loop.train(config, datasets.load(config.data), device=torch.device("cpu")))
    losses = [event.metrics["train/loss"] for event in events if isinstance(event, loop.StepReport)]
    metrics = {k: v for k, v in events[-1].metrics.items() if k.startswith("val/")}
    return losses, metrics


def on_rank(rank: int, world: int, run: str) -> tuple[list[float], dict[str, float]]:
    return train(run)


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_train_as_one_process_does(run: str) -> None:
    losses, metrics = train(run)
    for rank_losses, rank_metrics in ranks.run(2, on_rank, run):
        assert rank_losses == pytest.approx(losses, rel=1e-2)
        assert rank_losses[:3] == pytest.approx(losses[:3], rel=1e-5)
        assert rank_metrics == pytest.approx(metrics, abs=0.02)

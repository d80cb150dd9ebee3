"""W ranks train on what one would: same batches, same augmentation, same gradients, same evaluation."""

import pytest
import torch

from dml import loop, recipes
from dml.data import datasets
from tests.ddp import ranks

CONFIG = recipes.digits("short").replace(
    **{"train.epochs": 1, "train.steps_per_epoch": 12, "train.log_every": 1, "tcm.weight": 0.1, "optim.lr": 1e-3}
)


def train(loss: str) -> tuple[list[float], dict[str, float]]:
    config = CONFIG.replace(**{"loss.name": loss})
    events = list(loop.train(config, datasets.load(config.data), device=torch.device("cpu")))
    losses = [event.metrics["train/loss"] for event in events if isinstance(event, loop.StepReport)]
    metrics = {k: v for k, v in events[-1].metrics.items() if k.startswith("val/")}
    return losses, metrics


def on_rank(rank: int, world: int, loss: str) -> tuple[list[float], dict[str, float]]:
    return train(loss)


@pytest.mark.parametrize("loss", ["multi_similarity", "proxy_anchor"])
def test_two_ranks_train_as_one_process_does(loss: str) -> None:
    losses, metrics = train(loss)
    for rank_losses, rank_metrics in ranks.run(2, on_rank, loss):
        assert rank_losses == pytest.approx(losses, rel=1e-2)
        assert rank_losses[:3] == pytest.approx(losses[:3], rel=1e-5)
        assert rank_metrics == pytest.approx(metrics, abs=0.02)

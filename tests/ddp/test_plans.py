"""W ranks that choose batches by embeddings choose those that one would, and train on them alike."""

from typing import Any

import pytest
import torch

from dml import gather, loop, recipes
from dml.data import datasets, sampler
from tests.contracts.sampler_contract import SIZES, embedder, labels_of
from tests.ddp import ranks

# SGD, since AdamW's first steps turn a difference in the last bit of a small gradient into one of the weights.
CONFIG = recipes.digits("short").replace(
    **{
        "data.image_size": 8,
        "batch.sampler": "greedy_coreset",
        "batch.classes": 4,
        "batch.samples": 4,
        "batch.candidates": 4,
        "train.epochs": 2,
        "train.eval_every": 2,
        "train.steps_per_epoch": 5,
        "train.log_every": 1,
        "optim.name": "sgd",
        "optim.lr": 1e-2,
        "tcm.weight": 0.1,
    }
)


def planned(rank: int, world: int, steps: int) -> dict[str, Any]:
    labels = labels_of(SIZES)
    group = gather.default_group()
    found = {}
    for name in sampler.EMBEDDING_DRIVEN:
        batch = CONFIG.batch.model_copy(update={"sampler": name})
        found[name] = sampler.plan(
            labels, batch, seed=1, epoch=2, steps=steps, embed=embedder(labels), group=group
        ).tolist()
    return found


@pytest.mark.parametrize("steps", [1, 7])
def test_ranks_share_the_choosing_and_all_get_the_plan_of_one(steps: int) -> None:
    expected = planned(0, 1, steps)
    assert ranks.run(3, planned, steps) == [expected] * 3


def trained(rank: int, world: int) -> tuple[list[float], list[list[int]]]:
    events = list(loop.train(CONFIG, datasets.load(CONFIG.data), device=torch.device("cpu")))
    losses = [event.metrics["train/loss"] for event in events if isinstance(event, loop.StepReport)]
    last = events[-1]
    assert isinstance(last, loop.EpochReport)
    return losses, last.state.parts["plan"]["plan"].tolist()


def test_two_ranks_train_with_a_greedy_coreset_as_one_process_does() -> None:
    losses, plan = trained(0, 1)
    assert abs(losses[5] - losses[0]) > 0.02, "the encoder that chose the last epoch's batches is a trained one"
    for rank_losses, rank_plan in ranks.run(2, trained):
        assert rank_plan == plan
        assert rank_losses == pytest.approx(losses, rel=1e-5)

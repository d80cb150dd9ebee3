"""W ranks train on what one would: same batches, same augmentation, same gradients, same evaluation."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dml import learner, loop, recipes
from dml.data import datasets, images
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


def refused(rank: int, world: int) -> str:
    config = CONFIG.replace(**{"batch.classes": 2, "batch.samples": 1, "loss.name": "proxy_anchor"})
    with pytest.raises(ValueError) as error:
        list(loop.train(config, datasets.load(config.data), device=torch.device("cpu")))
    return str(error.value)


def test_more_ranks_than_images_in_a_batch_are_refused() -> None:
    message = "3 workers cannot share a batch of 2 images (batch.classes 2 x batch.samples 1)"
    assert all(said.startswith(message) for said in ranks.run(3, refused))


def logged(rank: int, world: int) -> dict[str, float]:
    """What is logged of the tuples and TCM of a random batch, whose ranks differ in pairs."""
    config = CONFIG.replace(
        **{
            "loss.name": "margin",
            "loss.miner": "random",
            "tcm.ramp": 0.0,
            "batch.sampler": "random",
            "batch.samples": 3,
        }
    )
    (report,) = itertools.islice(loop.train(config, datasets.load(config.data), device=torch.device("cpu")), 1)
    return {name: value for name, value in report.metrics.items() if name.startswith(("train/tcm/", "train/tuples"))}


def test_every_rank_logs_of_tuples_and_tcm_what_one_process_does() -> None:
    expected = logged(0, 1)
    assert len(expected) == 5
    assert all(value > 0 for value in expected.values())
    for world in (2, 4):
        assert ranks.run(world, logged) == [pytest.approx(expected, rel=1e-4)] * world


def weights_in_double(run: str) -> dict[str, Tensor]:
    """All parameters after 20 steps in float64, without statistics of a batch.

    Nor augmentation: it computes in float32, which rounds otherwise in a batch of another size.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "normalise", lambda pixels, config: images.normalise(pixels, config).double())
        torch.set_default_dtype(torch.float64)
        try:
            lasting = {"train.steps_per_epoch": 21, "train.checkpoint_every_steps": 20}
            plain = {"encoder.batch_norm": "frozen", "data.augment": "none"}
            config = CONFIG.replace(**lasting, **plain, **RUNS[run])
            for report in loop.train(config, datasets.load(config.data), device=torch.device("cpu")):
                if isinstance(report, loop.CheckpointReport):
                    assert report.step == 20
                    parts = report.state.parts
                    return {**parts["encoder"], **parts["loss"]}
        finally:
            torch.set_default_dtype(torch.float32)
    raise AssertionError("no checkpoint came")


def in_double_on_rank(rank: int, world: int, run: str) -> dict[str, Tensor]:
    return {name: tensor.numpy() for name, tensor in weights_in_double(run).items()}


@pytest.mark.parametrize("run", ["multi_similarity", "proxy_anchor"])
def test_in_double_precision_two_ranks_have_the_weights_of_one_process(run: str) -> None:
    expected = weights_in_double(run)
    assert all(tensor.dtype == torch.float64 for tensor in expected.values() if tensor.is_floating_point())
    for found in ranks.run(2, in_double_on_rank, run):
        for name, tensor in expected.items():
            torch.testing.assert_close(torch.from_numpy(found[name]), tensor, rtol=0, atol=1e-10)


class BreaksOnRankOne(nn.Module):
    """A loss that from its third call on is no number on one rank."""

    calls = 0

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        loss = (embeddings.sum(dim=1) * labels).mean()
        return loss * torch.nan if self.calls >= 3 and dist.get_rank() == 1 else loss


def broken(rank: int, world: int) -> str:
    config = CONFIG.replace(**{"loss.name": "tests.ddp.test_training:BreaksOnRankOne", "train.log_every": 4})
    with pytest.raises(loop.NonFiniteLossError) as caught:
        list(loop.train(config, datasets.load(config.data), device=torch.device("cpu")))
    return str(caught.value)


def test_every_rank_names_the_rank_whose_loss_is_no_number() -> None:
    first, second = ranks.run(2, broken)
    assert first == second
    assert first.startswith("loss is nan at step 3 on rank 1 of 2; last losses: ")

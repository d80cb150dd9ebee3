"""Losses over ranks where something is missing on one of them, losses from outside, and learned proxies in training."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dml import checkpoint, gather, loop, losses, recipes
from dml.config import LossConfig
from dml.data import datasets
from dml.losses.tcm import TCM
from dml.pairs import Pairs
from tests.ddp import ranks

DIM, CUT = 6, 4
OUTSIDE = ["pytorch_metric_learning.losses:CircleLoss", "pytorch_metric_learning.losses:ProxyNCALoss"]
BATCHES = {
    "the second rank has no positive": [0, 0, 1, 1, 2, 3, 4],
    "the second rank has no negative within it": [0, 0, 1, 2, 3, 3, 3],
    "no row has a positive": [0, 1, 2, 3, 4, 5, 6],
    "no row has a negative": [1, 1, 1, 1, 1, 1, 1],
    "the second rank has no row": [0, 0, 1, 1],
}


def gradients(name: str, labels: list[int], rows: slice) -> list[torch.Tensor]:
    """Gradients of loss + TCM at this rank's rows, those of the loss's own parameters included."""
    torch.manual_seed(0)
    loss = losses.from_config(LossConfig(name=name), num_classes=7, dim=DIM).double()
    weight = torch.randn(5, DIM, dtype=torch.float64).requires_grad_()
    images = torch.randn(len(labels), 5, dtype=torch.float64)
    group = gather.default_group()
    pairs = Pairs.of(images[rows] @ weight, torch.tensor(labels)[rows], group=group)
    (loss(pairs) + TCM(0.9, 0.1)(pairs)).backward()
    assert weight.grad is not None, "not connected: ranks would dead-lock"
    gather.average_gradients(loss, group)
    encoder = gather.sum_over_ranks(weight.grad, group) / gather.world(group)
    return [encoder, *(torch.zeros_like(p) if p.grad is None else p.grad for p in loss.parameters())]


def on_rank(rank: int, world: int, names: list[str], folder: Path) -> None:
    rows = slice(0, CUT) if rank == 0 else slice(CUT, None)
    found = {(name, case): gradients(name, labels, rows) for name in names for case, labels in BATCHES.items()}
    torch.save(found, folder / f"{rank}.pt")  # more than a pipe holds


@pytest.mark.parametrize("names", [sorted(losses.LOSSES), OUTSIDE], ids=["ours", "from outside"])
def test_ranks_that_lack_something_give_the_gradients_of_one_process(names: list[str], tmp_path: Path) -> None:
    ranks.run(2, on_rank, names, tmp_path)
    for rank in range(2):
        for (name, case), found in torch.load(tmp_path / f"{rank}.pt").items():
            for ours, expected in zip(found, gradients(name, BATCHES[case], slice(None)), strict=True):
                assert expected.isfinite().all(), f"{name}, {case}"
                torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9, msg=f"{name}, {case}")


TRAINED = ["soft_triple", OUTSIDE[1]]


def train(rank: int, world: int, folder: Path) -> None:
    """Trains each loss for two short epochs and stores it as a checkpoint."""
    config = recipes.digits("short").replace(
        **{"optim.name": "sgd", "optim.loss_lr": 0.5, "train.epochs": 2, "train.steps_per_epoch": 2}
    )
    splits = datasets.load(config.data)
    for name in TRAINED:
        path, seen = folder / f"{rank} of {world}" / name, []
        chosen = config.replace(**{"loss.name": name})
        for report in loop.train(chosen, splits, device=torch.device("cpu")):
            if isinstance(report, loop.EpochReport):
                seen += [tensor.clone() for tensor in report.state.parts["loss"].values()]
                checkpoint.save(path, report.encoder, chosen, info={}, state=report.state)
        (stored,) = load_file(path / "loss.safetensors").values()
        assert torch.equal(stored, seen[1])
        assert (seen[1] - seen[0]).abs().max() > 1e-3, "not trained"


def test_proxies_are_trained_alike_on_every_rank_and_stored(tmp_path: Path) -> None:
    ranks.run(1, train, tmp_path)
    ranks.run(2, train, tmp_path)
    for name in TRAINED:
        (alone,), (first,), (second,) = (
            load_file(tmp_path / rank / name / "loss.safetensors").values() for rank in ("0 of 1", "0 of 2", "1 of 2")
        )
        assert torch.equal(first, second), name
        torch.testing.assert_close(first, alone, rtol=0, atol=1e-4, msg=name)


def broadcast(rank: int, world: int) -> list[list[float]]:
    module = torch.nn.BatchNorm1d(3)
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data.fill_(rank + 5)
    gather.broadcast([*module.parameters(), *module.buffers()], gather.default_group())
    return [tensor.float().flatten().tolist() for tensor in [*module.parameters(), *module.buffers()]]


def test_a_loss_that_draws_its_own_start_begins_alike_on_all_ranks() -> None:
    """Parameters and buffers of rank 0 count, whatever a constructor did elsewhere."""
    first, second = ranks.run(2, broadcast)
    assert first == second == [[5.0] * 3] * 4 + [[5.0]]

"""The one gradient rule: on W ranks the gradients are those of one process on the whole batch."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dml import gather, losses
from dml.losses.tcm import TCM
from dml.pairs import Pairs
from tests.ddp import ranks

CLASSES, DIM, N = 5, 6, 20
NAMES = sorted(losses.LOSSES)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, 7, generator=generator, dtype=torch.float64), torch.arange(N) % CLASSES


def gradients(group: gather.Group | None, name: str, rows: slice) -> list[torch.Tensor]:
    """Value and gradients of loss + TCM for this rank's rows."""
    torch.manual_seed(1)
    model: nn.Module = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, DIM)).double()
    loss = losses.from_config(losses.LossConfig(name=name), num_classes=CLASSES, dim=DIM).double()
    tcm = TCM(0.9, 0.1)
    forward = DistributedDataParallel(model) if group is not None else model
    images, labels = data()
    pairs = Pairs.of(forward(images[rows]), labels[rows], group=group)
    value = loss(pairs) + 0.3 * tcm(pairs)
    value.backward()
    gather.average_gradients(loss, group)
    mean = gather.sum_over_ranks(value.detach(), group) / gather.world(group)
    return [mean, *(p.grad.detach().clone() for p in [*model.parameters(), *loss.parameters()])]


def on_rank(rank: int, world: int, cuts: list[int]) -> dict[str, list[list[float]]]:
    rows = slice(cuts[rank], cuts[rank + 1])
    found = {name: gradients(gather.default_group(), name, rows) for name in NAMES}
    return {name: [tensor.flatten().tolist() for tensor in tensors] for name, tensors in found.items()}


@pytest.mark.parametrize("cuts", [[0, 10, 20], [0, 13, 20], [0, 5, 6, 13, 20], [0, 0, 20]], ids=str)
def test_gradients_over_ranks_equal_those_of_one_process(cuts: list[int]) -> None:
    """Equal and unequal local batches, two and four ranks, and a rank with no row at all."""
    for found in ranks.run(len(cuts) - 1, on_rank, cuts):
        for name in NAMES:
            expected = gradients(None, name, slice(0, N))
            for ours, theirs in zip(found[name], expected, strict=True):
                torch.testing.assert_close(
                    torch.tensor(ours, dtype=torch.float64), theirs.flatten(), rtol=0, atol=1e-10
                )

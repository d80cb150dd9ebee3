"""The one gradient rule: on W ranks the gradients are those of one process on the whole batch."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dml import gather, losses
from dml.config import LossConfig
from dml.losses.loss import TupleLoss
from dml.losses.tcm import TCM
from dml.memory import Memory
from dml.miners import MINERS
from dml.pairs import Pairs
from tests.ddp import ranks

CLASSES, DIM, N = 5, 6, 20
TUPLE_LOSSES = [name for name, cls in losses.LOSSES.items() if issubclass(cls, TupleLoss)]
CASES: dict[str, tuple[LossConfig, int]] = {
    **{name: (LossConfig(name=name), 0) for name in losses.LOSSES},
    **{f"{name}, rho": (LossConfig(name=name, miner="random", rho=0.4), 0) for name in TUPLE_LOSSES},
    **{f"margin, {miner}, rho": (LossConfig(name="margin", miner=miner, rho=0.3), 0) for miner in MINERS},
    **{f"{name}, memory": (LossConfig(name=name), 12) for name, cls in losses.LOSSES.items() if cls.takes_memory},
    "quadruplet, memory, rho": (LossConfig(name="quadruplet", miner="distance_weighted", rho=0.3), 12),
}
"""Loss, and size of the cross-batch memory."""


def data(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, labels and ids; half of the samples of the first batch are in the second as well, and one is in it twice.

    Its places are on two ranks.
    """
    images = torch.randn(N, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ids = torch.arange(N) + seed * N // 2
    images[3 * CLASSES], ids[3 * CLASSES] = images[0], ids[0]
    return images, torch.arange(N) % CLASSES, ids


def gradients(group: gather.Group | None, case: str, rows: slice) -> list[torch.Tensor]:
    """Value, and gradients of loss + TCM, for this rank's rows; with a memory that a batch before has filled."""
    config, size = CASES[case]
    torch.manual_seed(1)
    model: nn.Module = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, DIM)).double()
    loss = losses.from_config(config, num_classes=CLASSES, dim=DIM).double()
    tcm = TCM(0.9, 0.1)
    forward = DistributedDataParallel(model) if group is not None else model
    memory = Memory(size, DIM).double() if size else None
    if memory is not None:
        images, labels, ids = (x[rows] for x in data(1))
        before = Pairs.of(model(images), labels, ids_B=ids, group=group)
        memory.add(before.cols, before.col_labels, before.col_ids)
    images, labels, ids = (x[rows] for x in data(0))
    pairs = Pairs.of(forward(images), labels, ids_B=ids, key=(5, 3), group=group, memory=memory)
    value = loss(pairs.extended if loss.takes_memory else pairs) + 0.3 * tcm(pairs)
    value.backward()
    gather.average_gradients(loss, group)
    mean = gather.sum_over_ranks(value.detach(), group) / gather.world(group)
    kept = [] if memory is None else list(memory.state_dict().values())
    return [mean, *(p.grad.detach().clone() for p in [*model.parameters(), *loss.parameters()]), *kept]


def on_rank(rank: int, world: int, cuts: list[int]) -> dict[str, float]:
    """How far each case is from one process, at most."""
    rows, found = slice(cuts[rank], cuts[rank + 1]), {}
    for case in CASES:
        ours, alone = gradients(dist.group.WORLD, case, rows), gradients(None, case, slice(0, N))
        assert len(ours) == len(alone)
        found[case] = max(float((a - b).abs().max()) for a, b in zip(ours, alone, strict=True))
    return found


@pytest.mark.parametrize("cuts", [[0, 20], [0, 10, 20], [0, 0, 6, 13, 20]], ids=str)
def test_gradients_over_ranks_equal_those_of_one_process(cuts: list[int]) -> None:
    """Equal and unequal local batches, one, two and four ranks, and a rank with no row at all."""
    for found in ranks.run(len(cuts) - 1, on_rank, cuts):
        assert found == {case: pytest.approx(0, abs=1e-10) for case in CASES}


def test_a_memory_and_rho_and_the_miner_change_the_gradients() -> None:
    """Else their cases above would test nothing of them."""
    whole = slice(0, N)
    plain = {case: gradients(None, case, whole)[1] for case in CASES}
    for case, (config, _) in CASES.items():
        if case != config.name:
            assert not torch.allclose(plain[case], plain[config.name]), case
    mined = [plain[case] for case in CASES if case.startswith("margin")]
    assert not any(torch.allclose(a, b) for i, a in enumerate(mined) for b in mined[:i])

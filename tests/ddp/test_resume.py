"""Two gloo ranks that go on from a checkpoint end with the weights of two that never stopped, bit for bit."""

from pathlib import Path
from typing import Any

import torch

from dml import checkpoint, loop
from dml.data import datasets
from tests.ddp import ranks
from tests.dml.test_resume import CONFIG, RUNS, assert_goes_on, told

CPU = torch.device("cpu")
NAMES = ("batch norm", "thaw", "memory", "ema", "chosen by embeddings")
STEPS = (3, 5, 6)  # within an epoch, at its end, and within the last
Reports = list[dict[str, Any]]


def begun(rank: int, world: int, folder: Path) -> dict[str, Reports]:
    """Uninterrupted trainings; rank 0 tells, and keeps each state under folder/NAME/STEP."""
    found: dict[str, Reports] = {name: [] for name in NAMES}
    for name, reports in found.items():
        config = CONFIG.replace(**{"train.log_every": 1, **RUNS[name], "train.epochs": 2})
        for report in loop.train(config, datasets.load(config.data), device=CPU):
            reports.append(told(report))
            if rank == 0 and not isinstance(report, loop.StepReport):
                path = folder / name / str(report.step)
                checkpoint.save(path, report.encoder, config, info={}, state=report.state)
    return found if rank == 0 else {}


def gone_on(rank: int, world: int, folder: Path) -> dict[tuple[str, int], Reports]:
    """What rank 0 tells from each of these states on."""
    found = {}
    for name in NAMES:
        for step in STEPS:
            state = checkpoint.load_state(folder / name / str(step))
            splits = datasets.load(state.config.data)
            reports = loop.train(state.config, splits, device=CPU, resume=state)
            found[name, step] = [told(report) for report in reports]
    return found if rank == 0 else {}


def test_two_ranks_go_on_as_if_they_had_never_stopped(tmp_path: Path) -> None:
    expected, _ = ranks.run(2, begun, tmp_path, timeout=250)
    found, _ = ranks.run(2, gone_on, tmp_path, timeout=250)
    assert len(found) == len(NAMES) * len(STEPS)
    for (name, step), reports in found.items():
        assert_goes_on(reports, expected[name], step)

"""A training that goes on from any of its checkpoints does, bit for bit, what it would have done."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dml import checkpoint, loop, recipes
from dml.config import Config
from dml.data import datasets
from dml.state import State, StateError

CPU = torch.device("cpu")
CONFIG = recipes.digits("short").replace(
    **{
        "data.image_size": 8,
        "batch.classes": 4,
        "batch.samples": 4,
        "encoder.dim": 16,
        "train.epochs": 3,
        "train.steps_per_epoch": 5,
        "train.log_every": 2,
        "train.checkpoint_every_steps": 3,
        "tcm.weight": 0.1,
    }
)
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sgd": {"optim.name": "sgd", "optim.schedule": "step", "train.eval_every": 2},
    "ema": {"optim.ema": 0.9, "train.micro_batch": 5},
    "proxies": {"loss.name": "proxy_anchor", "optim.clip": 0.1},
    "thaw": {"loss.name": "soft_triple", "optim.frozen_backbone": 0.5, "optim.ema": 0.9},
    "memory": {"loss.name": "margin", "loss.miner": "random", "loss.rho": 0.3, "memory.size": 40, "memory.start": 0.1},
    "chosen by embeddings": {"batch.sampler": "greedy_coreset", "batch.candidates": 4, "batch.embed_every": 2},
    "batch norm": {"encoder.name": "test_efficientnet", "data.image_size": 32, "train.epochs": 2},
}


def trained(config: Config, resume: State | None = None) -> Iterator[loop.Report]:
    return loop.train(config, datasets.load(config.data), device=CPU, resume=resume)


def told(report: loop.Report) -> tuple[Any, ...]:
    """Everything that a listener sees of a report, except how long it took; tensors as they are now."""
    if isinstance(report, loop.StepReport):
        return report.step, report.metrics
    parts = {f"{part}/{k}": v.clone() for part, tensors in report.state.parts.items() for k, v in tensors.items()}
    if isinstance(report, loop.CheckpointReport):
        return report.step, report.state.progress, parts
    metrics = {name: value for name, value in report.metrics.items() if name != "train/images_per_second"}
    return report.step, report.epoch, report.stopped, metrics, report.state.progress, parts


def assert_equal(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert one[:-1] == other[:-1]
    assert one[-1].keys() == other[-1].keys()
    for name, value in one[-1].items():
        assert torch.equal(value, other[-1][name]) if isinstance(value, torch.Tensor) else value == other[-1][name], (
            name
        )


def watched(config: Config, folder: Path) -> list[tuple[Any, ...]]:
    """An uninterrupted training, with a checkpoint of each of its states under folder/STEP."""
    reports = []
    for report in trained(config):
        reports.append(told(report))
        if not isinstance(report, loop.StepReport):
            checkpoint.save(folder / str(report.step), report.encoder, config, info={}, state=report.state)
    return reports


@pytest.mark.parametrize("run", RUNS)
def test_from_every_checkpoint_a_training_goes_on_as_if_it_had_never_stopped(run: str, tmp_path: Path) -> None:
    config = CONFIG.replace(**RUNS[run])
    expected = watched(config, tmp_path)
    folders = sorted(tmp_path.iterdir(), key=lambda folder: int(folder.name))
    steps = [int(folder.name) for folder in folders]
    assert {3, 6, 9} <= set(steps), "mid-epoch too"
    for folder, step in zip(folders, steps, strict=True):
        found = [told(report) for report in trained(config, checkpoint.load_state(folder))]
        rest = [report for report in expected if report[0] > step]
        assert len(found) == len(rest)
        for one, other in zip(found, rest, strict=True):
            assert_equal(one, other)


def test_patience_counts_on_and_a_training_that_stopped_stays_so(tmp_path: Path) -> None:
    """A rate of almost nothing: no evaluation after the first is better."""
    config = CONFIG.replace(**{"optim.lr": 1e-12, "train.patience": 2, "train.epochs": 6})
    expected = watched(config, tmp_path)
    ended = expected[-1][0]
    assert ended < 6 * 5, "stopped early"
    found = [told(report) for report in trained(config, checkpoint.load_state(tmp_path / str(ended - 5)))]
    assert found[-1][:3] == expected[-1][:3]
    assert found[-1][2], "stopped"
    assert list(trained(config, checkpoint.load_state(tmp_path / str(ended)))) == []


def test_other_settings_and_other_data_are_refused_in_words(tmp_path: Path) -> None:
    config = CONFIG.replace(**{"train.epochs": 1})
    watched(config, tmp_path)
    state = checkpoint.load_state(tmp_path / "3")
    with pytest.raises(
        StateError, match=r"optim[.]lr is 0[.]01, was 0[.]001; loss[.]options[.]alpha is 3[.]0, was None"
    ):
        next(trained(config.replace(**{"optim.lr": 0.01, "loss.options.alpha": 3}), state))
    other = datasets.load(config.data.model_copy(update={"split_seed": 1}))
    with pytest.raises(StateError, match="the data are not those that the run began with"):
        next(loop.train(config, other, device=CPU, resume=state))

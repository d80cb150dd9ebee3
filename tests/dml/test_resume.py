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


def told(report: loop.Report) -> dict[str, Any]:
    """Everything that a listener sees of a report, except how long it took; of tensors the bytes."""
    if isinstance(report, loop.StepReport):
        return {"step": report.step, **_untimed(report.metrics)}
    found: dict[str, Any] = {"step": report.step, "progress": report.state.progress}
    for part, tensors in report.state.parts.items():
        found |= {f"{part}/{name}": value.numpy().tobytes() for name, value in tensors.items()}
    if isinstance(report, loop.EpochReport):
        found |= {"epoch": report.epoch, "stopped": report.stopped, **_untimed(report.metrics)}
    return found


def _untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {
        name: value for name, value in metrics.items() if name not in ("train/images_per_second", "train/data_wait")
    }


def assert_goes_on(found: list[dict[str, Any]], expected: list[dict[str, Any]], step: int) -> None:
    """What was reported from a step on is what the uninterrupted training reported after it."""
    rest = [report for report in expected if report["step"] > step]
    assert [report["step"] for report in found] == [report["step"] for report in rest]
    for one, other in zip(found, rest, strict=True):
        differ = [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]
        assert differ == [], f"from step {step}, at step {one['step']}"


def watched(config: Config, folder: Path) -> list[dict[str, Any]]:
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
        assert_goes_on(found, expected, step)


def test_patience_counts_on_and_a_training_that_stopped_stays_so(tmp_path: Path) -> None:
    """A rate of almost nothing: no evaluation after the first is better."""
    config = CONFIG.replace(**{"optim.lr": 1e-12, "train.patience": 2, "train.epochs": 6})
    expected = watched(config, tmp_path)
    ended = expected[-1]["step"]
    assert ended < 6 * 5, "stopped early"
    found = [told(report) for report in trained(config, checkpoint.load_state(tmp_path / str(ended - 5)))]
    assert_goes_on(found, expected, ended - 5)
    assert found[-1]["stopped"]
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

"""The training loop on the toy digits: it learns, repeats itself, and stops in words when the loss is no number."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch._inductor.utils import fresh_cache

from dml import encoders, learner, loop, recipes
from dml.config import Config, TCMConfig
from dml.data import datasets
from dml.learner import Learner

CPU = torch.device("cpu")
CONFIG = recipes.digits("short").replace(**{"train.epochs": 2, "train.steps_per_epoch": 12, "train.log_every": 5})


def reports(config: Config) -> list[loop.StepReport | loop.EpochReport]:
    return list(loop.train(config, datasets.load(config.data), device=CPU))


def test_training_lowers_the_loss_and_reports_as_it_goes() -> None:
    found = reports(CONFIG)
    steps = [event for event in found if isinstance(event, loop.StepReport)]
    epochs = [event for event in found if isinstance(event, loop.EpochReport)]
    assert [event.step for event in steps] == [5, 10, 12, 15, 20, 24]
    assert [(event.epoch, event.step) for event in epochs] == [(1, 12), (2, 24)]
    assert steps[-1].metrics["train/loss"] < 0.7 * steps[0].metrics["train/loss"]
    assert epochs[-1].metrics["val/recall@1"] > 0.9
    assert 0 < epochs[-1].metrics["val/opis"] < 0.25


def test_reports_say_how_training_goes() -> None:
    found = reports(CONFIG.replace(**{"tcm.weight": 0.5, "optim.clip": 0.5, "tcm.ramp": 0.0}))
    steps = [event.metrics for event in found if isinstance(event, loop.StepReport)]
    epochs = [event.metrics for event in found if isinstance(event, loop.EpochReport)]
    assert all(event.total == 24 for event in found)
    for metrics in steps:
        assert metrics["train/gradient_norm"] > 0.5, "as it was before clipping"
        assert metrics["train/loss"] > metrics["train/loss_base"] > 0
        assert {"train/tcm/positive", "train/tcm/negative", "train/tcm/hard_negatives", "train/lr"} <= set(metrics)
    for metrics in [*steps, *epochs]:
        assert metrics["train/images_per_second"] > 0
        assert 0 < metrics["train/data_wait"] < 1
    mean = sum(metrics["train/loss"] * count for metrics, count in zip(steps[:3], (5, 5, 2), strict=True)) / 12
    assert epochs[0]["train/loss"] == pytest.approx(mean)
    assert epochs[1]["train/pi_ratio"] < epochs[0]["train/pi_ratio"], "classes of train draw together"


def test_the_gradient_norm_is_that_of_the_encoders_gradients() -> None:
    """Plain SGD without momentum's history moves the weights by lr times the gradient in its first step."""
    settings = {"optim.name": "sgd", "optim.clip": 0.0, "optim.warmup": 0.0, "optim.schedule": "constant"}
    settings |= {"optim.weight_decay": 0.0, "optim.lr": 0.1, "train.epochs": 1, "train.steps_per_epoch": 1}
    step, epoch = reports(CONFIG.replace(**settings))
    assert isinstance(epoch, loop.EpochReport)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(CONFIG.train.seed)
        start = encoders.build(CONFIG.encoder, channels=1, image_size=CONFIG.data.image_size)
    moved = [a - b for a, b in zip(start.parameters(), epoch.encoder.parameters(), strict=True)]
    norm = torch.cat([part.detach().flatten() for part in moved]).norm() / 0.1
    assert step.metrics["train/gradient_norm"] == pytest.approx(float(norm), rel=1e-3)


def test_the_same_seed_trains_the_same_weights() -> None:
    first, second = (reports(CONFIG)[-1].encoder.state_dict() for _ in range(2))
    other = reports(CONFIG.replace(**{"train.seed": 1}))[-1].encoder.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_the_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    reports(CONFIG.replace(**{"train.epochs": 1, "train.steps_per_epoch": 1}))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", ["contrastive", "multi_similarity", "proxy_anchor"])
def test_every_loss_trains_with_tcm(name: str) -> None:
    config = CONFIG.replace(**{"loss.name": name, "tcm.weight": 0.1, "train.steps_per_epoch": 25})
    last = [event for event in reports(config) if isinstance(event, loop.StepReport)][-1]
    assert last.metrics["train/tcm_weight"] == pytest.approx(0.1)
    assert 0 < last.metrics["train/tcm/hard_positives"] <= 1


def test_a_mined_loss_trains_with_rho_and_a_memory_that_ends_full_of_the_last_batches() -> None:
    settings = {
        "loss.name": "triplet",
        "loss.miner": "random",
        "loss.rho": 0.2,
        "memory.size": 100,
        "memory.start": 0.2,
    }
    config = CONFIG.replace(**settings)
    last = reports(config)[-1]
    again = reports(config)[-1]
    memory = last.state.parts["memory"]
    other = reports(config.replace(**{"memory.start": 1.0}))[-1]
    assert last.metrics["val/recall@1"] > 0.9
    assert int(memory["written"]) == 24 * config.batch.size
    assert (memory["ids"] >= 0).all()
    torch.testing.assert_close(memory["embeddings"].norm(dim=1), torch.ones(100))
    first, second, third = (next(iter(report.encoder.parameters())) for report in (last, again, other))
    assert torch.equal(first, second), "draws are keyed by seed and step"
    assert not torch.equal(first, third), "from start on, the memory counts"


def test_batches_that_taught_nothing_are_counted() -> None:
    """Distances of unit vectors are at least 0 and all within 2: nothing violates these margins."""
    options = {"margin_pos": 2.0, "margin_neg": 0.0}
    config = CONFIG.replace(**{"loss.name": "contrastive", "loss.options": options, "tcm.weight": 0.1})
    epochs = [event for event in reports(config) if isinstance(event, loop.EpochReport)]
    assert [event.metrics["train/batches_without_loss"] for event in epochs] == [12, 12]
    assert epochs[-1].metrics["train/loss"] > 0, "TCM still taught"
    usual = [event for event in reports(CONFIG) if isinstance(event, loop.EpochReport)]
    assert [event.metrics["train/batches_without_loss"] for event in usual] == [0, 0]


def test_a_loss_that_is_no_number_ends_the_training_with_step_and_last_losses() -> None:
    config = CONFIG.replace(**{"optim.name": "sgd", "optim.lr": 1e30, "optim.clip": 0, "optim.warmup": 0})
    with pytest.raises(loop.NonFiniteLossError, match=r"loss is (nan|inf) at step \d+; last losses: .*, (nan|inf)"):
        reports(config)


class Breaks(nn.Module):
    """A loss that at one step is no number, or of which the gradient of its own proxies is none."""

    def __init__(self, num_classes: int, dim: int, at: float, value: float) -> None:
        super().__init__()
        self.proxies = nn.Parameter(torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(0)))
        self.at, self.value, self.calls = at, value, 0

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(embeddings @ self.proxies.T, labels)
        self.calls += 1
        if self.calls != self.at:
            return loss
        return loss * torch.nan if self.value else loss + (0 * self.proxies).square().sqrt().sum()


@pytest.mark.parametrize(("value", "what"), [(1, "loss is nan"), (0, "the norm of the gradient is nan")])
@pytest.mark.parametrize("optimiser", ["adamw", "adam", "sgd"])
def test_from_a_gradient_that_is_no_number_on_no_weight_changes(
    optimiser: str, value: int, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found without asking the device: the step is skipped there, and those after it until the losses are read."""
    losses = {"loss.name": "tests.dml.test_loop:Breaks", "loss.options": {"at": 4, "value": value}}
    config = CONFIG.replace(**losses, **{"optim.name": optimiser, "train.log_every": 6})
    seen, step = [], Learner.step

    def watched(run: Learner, *args: Any) -> Tensor:
        values = step(run, *args)
        tensors = [*run.encoder.parameters(), *run.loss.parameters()]
        seen.append([tensor.detach().clone() for tensor in tensors])
        return values

    monkeypatch.setattr(Learner, "step", watched)
    with pytest.raises(loop.NonFiniteLossError, match=f"{what} at step 4; last losses: .*, "):
        reports(config)
    assert len(seen) == 6, "read after six steps"
    changed = [
        any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) for before, after in pairwise(seen)
    ]
    assert changed == [True, True, False, False, False]


def test_an_error_of_a_step_says_when_it_came_and_after_which_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Learner.step

    def short(run: Learner, batch: Any, number: int, progress: float) -> Tensor:
        if number == 15:
            raise torch.OutOfMemoryError("out of memory")
        return step(run, batch, number, progress)

    monkeypatch.setattr(Learner, "step", short)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        reports(CONFIG.replace(**{"train.log_every": 2}))
    (note,) = caught.value.__notes__
    assert re.fullmatch(r"after 15 of 24 steps; last losses: [0-9.]+, [0-9.]+", note)


@pytest.mark.parametrize(
    ("progress", "weight"), [(0.0, 0.0), (0.29, 0.0), (0.3, 0.0), (0.35, 0.25), (0.4, 0.5), (0.99, 0.5)]
)
def test_tcm_is_off_until_its_start_and_then_ramped(progress: float, weight: float) -> None:
    assert learner.tcm_weight(progress, TCMConfig(weight=0.5, start=0.3, ramp=0.1)) == pytest.approx(weight)


def test_without_a_ramp_tcm_is_on_at_once() -> None:
    assert learner.tcm_weight(0.3, TCMConfig(weight=0.5, start=0.3, ramp=0.0)) == 0.5


def test_a_frozen_backbone_trains_from_its_thaw_on_and_the_projection_from_the_start() -> None:
    settings = {"optim.frozen_backbone": 0.5, "loss.name": "proxy_anchor", "optim.projection_lr": 2e-3}
    start, thaw, end = ([], [], [])
    found = loop.train(CONFIG.replace(**settings), datasets.load(CONFIG.data), device=CPU)
    rates = []
    for event in found:
        if isinstance(event, loop.StepReport):
            rates.append([event.metrics[f"train/{name}"] for name in ("lr", "lr_projection", "lr_loss")])
            continue
        (thaw if event.epoch == 1 else end).extend(p.detach().clone() for p in event.encoder.parameters())
        if event.epoch == 1:
            assert event.metrics["val/recall@1"] > 0.5, "a projection of random features"
    never = CONFIG.replace(**settings | {"optim.frozen_backbone": 1.0})
    start.extend(p.detach().clone() for p in reports(never)[-1].encoder.parameters())
    moved = [(torch.equal(a, b), torch.equal(b, c)) for a, b, c in zip(start, thaw, end, strict=True)]
    assert moved[:-2] == [(True, False)] * (len(moved) - 2), "the backbone, still and then trained"
    assert moved[-2:] == [(False, False)] * 2, "the projection"
    assert [rate == 0 for rate, _, _ in rates] == [True] * 3 + [False] * 3
    assert all(projection > 0 and loss > 0 for _, projection, loss in rates)


@pytest.mark.parametrize(("name", "rate"), [("adamw", 1e-3), ("adam", 1e-3), ("sgd", 0.1)])
@pytest.mark.parametrize("schedule", ["constant", "step"])
def test_every_optimiser_and_schedule_trains(name: str, rate: float, schedule: str) -> None:
    config = CONFIG.replace(**{"optim.name": name, "optim.schedule": schedule, "optim.lr": rate})
    losses = [event.metrics["train/loss"] for event in reports(config) if isinstance(event, loop.StepReport)]
    assert losses[-1] < 0.8 * losses[0]


def test_a_compiled_encoder_trains_as_the_plain_one_does() -> None:
    config = CONFIG.replace(**{"train.epochs": 1, "train.steps_per_epoch": 6, "train.log_every": 1})
    plain, compiled = (reports(config.replace(**{"train.compile": choice})) for choice in (False, True))
    losses = [[event.metrics["train/loss"] for event in events[:-1]] for events in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    ours, theirs = (events[-1].encoder.state_dict() for events in (plain, compiled))
    assert ours.keys() == theirs.keys(), "a checkpoint does not tell whether its encoder was compiled"


def test_compiling_without_a_compiler_is_refused_in_words(tmp_path: Path) -> None:
    config = CONFIG.replace(**{"train.compile": True})
    with fresh_cache(), inductor.patch({"cpp.cxx": (str(tmp_path / "no-such-compiler"),)}):
        torch.compiler.reset()
        with pytest.raises(
            ValueError, match=r"train\.compile cannot compile for cpu here: .*; it needs a C\+\+ compiler"
        ):
            reports(config)
    torch.compiler.reset()

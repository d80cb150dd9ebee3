"""Which parameters are trained at which rate, and how the rates move."""

from typing import Any

import pytest
import torch

from dml import encoders, losses, optim
from dml.config import EncoderConfig, LossConfig, OptimConfig


def built(config: OptimConfig, encoder: str = "resnet10t", loss: str = "proxy_anchor") -> torch.optim.Optimizer:
    made = encoders.build(EncoderConfig(name=encoder, dim=4), channels=3, image_size=32)
    return optim.build(made, losses.from_config(LossConfig(name=loss), num_classes=3, dim=4), config)


def groups(optimizer: torch.optim.Optimizer) -> dict[tuple[str, float], list[torch.Tensor]]:
    return {(group["part"], group["weight_decay"]): group["params"] for group in optimizer.param_groups}


def factors(**settings: Any) -> list[float]:
    start = settings.pop("start", 0.0)
    return [optim.rate_factor(step / 100, OptimConfig(**settings), start=start) for step in range(100)]


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_every_name_is_its_optimiser_in_its_fused_form(name: Any, kind: type) -> None:
    optimizer = built(OptimConfig(name=name))
    assert type(optimizer) is kind
    assert all(group["fused"] for group in optimizer.param_groups)


def test_backbone_projection_and_proxies_have_rates_of_their_own() -> None:
    optimizer = built(OptimConfig(lr=1e-4, projection_lr=2e-3, loss_lr=0.5))
    assert optim.rates(optimizer) == {"backbone": 1e-4, "projection": 2e-3, "loss": 0.5}
    assert optim.rates(built(OptimConfig(lr=1e-4), loss="triplet")) == {"backbone": 1e-4, "projection": 1e-4}


def test_kernels_and_matrices_decay_and_norms_biases_and_proxies_do_not() -> None:
    found = groups(built(OptimConfig(weight_decay=0.3)))
    assert list(found) == [
        ("backbone", 0.3),
        ("backbone", 0.0),
        ("projection", 0.3),
        ("projection", 0.0),
        ("loss", 0.0),
    ]
    assert {parameter.ndim for parameter in found["backbone", 0.3]} == {4}
    assert {parameter.ndim for parameter in found["backbone", 0.0]} == {1}
    assert [parameter.shape for parameter in found["projection", 0.3]] == [(4, 512)]
    assert [parameter.shape for parameter in found["loss", 0.0]] == [(3, 4)]


def test_what_a_backbone_exempts_from_decay_is_exempt() -> None:
    """The position embedding and the class token of a transformer have three dimensions, as a weight might."""
    found = groups(built(OptimConfig(weight_decay=0.3), encoder="vit_tiny_patch16_224"))
    assert 3 in {parameter.ndim for parameter in found["backbone", 0.0]}
    assert {parameter.ndim for parameter in found["backbone", 0.3]} == {2, 4}


def test_every_parameter_is_in_one_group() -> None:
    encoder = encoders.build(EncoderConfig(), channels=1, image_size=32)
    loss = losses.from_config(LossConfig(name="soft_triple"), num_classes=3, dim=64)
    optimizer = optim.build(encoder, loss, OptimConfig(weight_decay=0))
    trained = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(trained) == sorted(id(parameter) for parameter in [*encoder.parameters(), *loss.parameters()])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_every_schedule_begins_with_a_linear_rise(schedule: str) -> None:
    found = factors(schedule=schedule, warmup=0.1)
    assert found[1:11] == pytest.approx([step / 10 for step in range(1, 11)])
    assert 0 < found[0] < 0.1, "the first step is not lost"


def test_constant_stays_cosine_falls_to_zero_and_step_falls_in_stairs() -> None:
    assert factors(schedule="constant", warmup=0) == [1.0] * 100
    cosine = factors(schedule="cosine", warmup=0.1)[10:]
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[45] == pytest.approx(0.5)
    assert 0 < cosine[-1] < 0.01
    stairs = factors(schedule="step", step_every=0.3, step_factor=0.5, warmup=0)
    assert stairs == [1.0] * 30 + [0.5] * 30 + [0.25] * 30 + [0.125] * 10


def test_a_backbone_that_thaws_warms_up_from_there_and_then_joins_the_others() -> None:
    late, usual = factors(warmup=0.1, start=0.3), factors(warmup=0.1)
    assert late[:30] == [0.0] * 30
    assert late[35] == pytest.approx(0.5 * usual[35])
    assert late[40:] == usual[40:]
    optimizer = built(OptimConfig(frozen_backbone=0.3, warmup=0, schedule="constant", lr=0.5, loss_lr=0.5))
    optim.set_rates(optimizer, 0.2, OptimConfig(frozen_backbone=0.3, warmup=0, schedule="constant"))
    assert optim.rates(optimizer) == {"backbone": 0.0, "projection": 0.5, "loss": 0.5}

"""Gradients of a batch in chunks are those of the whole batch, for every loss, on one rank and on two."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dml import encoders, gather, gradient_cache, loop, losses, recipes
from dml.config import EncoderConfig, LossConfig
from dml.data import datasets
from dml.gradient_cache import Within
from dml.losses.tcm import TCM
from dml.pairs import Pairs
from tests.ddp import ranks

CLASSES, DIM, N = 5, 6, 21
CPU = torch.device("cpu")
SETTINGS = {"train.epochs": 1, "train.steps_per_epoch": 8, "train.log_every": 1, "tcm.weight": 0.1}
DIGITS = recipes.digits("short").replace(**SETTINGS, **{"optim.name": "sgd", "optim.lr": 1e-2})


def net(dropout: float) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, DIM)).double()


def plainly(_: int) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def keyed(chunk: int) -> contextlib.AbstractContextManager[None]:
    return gradient_cache.seeded(CPU, 5, 3, chunk)


def with_graph(module: nn.Module, chunks: Any, within: Within) -> Tensor:
    """What the cache avoids: all chunks' graphs at once."""
    parts = []
    for index, chunk in enumerate(chunks):
        with within(index):
            parts.append(module(chunk))
    return torch.cat(parts)


def gradients(
    name: str, micro_batch: int | None, *, rows: slice = slice(None), largest: int = N, dropout: float = 0.0
) -> list[Tensor]:
    """Of loss + TCM, for net and loss, by chunks or (None) with all graphs at once."""
    images = torch.randn(N, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)[rows]
    labels = (torch.arange(N) % CLASSES)[rows]
    module, group = net(dropout), gather.default_group()
    loss = losses.from_config(LossConfig(name=name), num_classes=CLASSES, dim=DIM).double()
    forward = DistributedDataParallel(module) if group is not None else module
    within = keyed if dropout else plainly
    chunks = gradient_cache.split(images, micro_batch or 4, largest)
    embeddings = (
        with_graph(module, chunks, within) if micro_batch is None else gradient_cache.embed(forward, chunks, within)
    )
    pairs = Pairs.of(embeddings, labels, key=(5, 3), group=group)
    (loss(pairs) + 0.3 * TCM(0.9, 0.1)(pairs)).backward()
    if micro_batch is not None:
        assert embeddings.grad is not None
        gradient_cache.backward(forward, chunks, embeddings.grad, within)
    gather.average_gradients(loss, group)
    return [parameter.grad.detach().clone() for parameter in [*module.parameters(), *loss.parameters()]]


def furthest(ours: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest gradient."""
    assert len(ours) == len(expected)
    scale = max(float(tensor.abs().max()) for tensor in expected)
    assert scale > 0
    return max(float((a - b).abs().max()) for a, b in zip(ours, expected, strict=True)) / scale


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_has_the_plain_gradient_its_own_parameters_included(name: str) -> None:
    expected = gradients(name, None)
    for micro_batch in (1, 4, N):
        assert furthest(gradients(name, micro_batch), expected) < 1e-12


def on_rank(rank: int, world: int) -> dict[str, float]:
    """Parts of the batch that are unequal, cut into as many chunks."""
    rows, largest = (slice(0, 12), 12) if rank == 0 else (slice(12, N), 12)
    return {name: furthest(gradients(name, 5, rows=rows, largest=largest), alone(name)) for name in losses.LOSSES}


def alone(name: str) -> list[Tensor]:
    """The plain gradient of the whole batch, on a rank too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather, "default_group", lambda: None)
        return gradients(name, None)


def test_on_two_ranks_every_loss_has_the_gradient_of_one_process() -> None:
    for found in ranks.run(2, on_rank):
        assert found == {name: pytest.approx(0, abs=1e-10) for name in losses.LOSSES}


def empty(rank: int, world: int) -> float:
    rows = slice(0, N) if rank == 0 else slice(N, N)
    return furthest(gradients("proxy_anchor", 4, rows=rows), alone("proxy_anchor"))


def test_a_rank_without_rows_takes_part() -> None:
    assert ranks.run(2, empty) == [pytest.approx(0, abs=1e-10)] * 2


def reductions(rank: int, world: int) -> list[int]:
    """How often DDP has reduced gradients, after each chunk's backward and in the end."""
    forward, counts = DistributedDataParallel(net(0)), [0]

    def counting(_: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
        counts[-1] += 1
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    forward.register_comm_hook(None, counting)
    for pieces in (1, 3):
        chunks = torch.ones(6, 7, dtype=torch.float64).tensor_split(pieces)
        embeddings = gradient_cache.embed(forward, chunks, plainly)
        gradient_cache.backward(forward, chunks, torch.ones_like(embeddings), plainly)
        counts.append(0)
    return counts[:-1]


def test_gradients_are_reduced_once_however_many_chunks_there_are() -> None:
    assert ranks.run(2, reductions) == [[1, 1]] * 2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", ["recall_surrogate", "multi_similarity", "proxy_anchor"])
def test_a_network_with_frozen_batch_norm_has_the_plain_gradient(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    """In float32 it is as far from it as rounding puts a batch in another order."""
    torch.manual_seed(0)
    encoder = encoders.build(EncoderConfig(name="resnet10t", dim=8), channels=3, image_size=32)
    encoder.freeze_statistics(True)
    # Not the encoder itself, whose embeddings are float32 whatever its weights are.
    module = nn.Sequential(encoder.backbone, encoder.projection).to(dtype)
    loss = losses.from_config(LossConfig(name=name), num_classes=6, dim=8).to(dtype)
    images, labels = torch.randn(24, 3, 32, 32, dtype=dtype), torch.arange(24) % 6
    loss(Pairs.of(module(images), labels)).backward()
    expected = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    chunks = gradient_cache.split(images, 7, 24)
    embeddings = gradient_cache.embed(module, chunks, plainly)
    loss(Pairs.of(embeddings, labels)).backward()
    gradient_cache.backward(module, chunks, embeddings.grad, plainly)
    for parameter, plain in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, plain, rtol=0, atol=tolerance)


def test_dropout_is_the_same_in_both_passes_and_another_in_each_chunk() -> None:
    expected = gradients("triplet", None, dropout=0.5)
    assert furthest(gradients("triplet", 4, dropout=0.5), expected) < 1e-12
    assert furthest(gradients("triplet", None), expected) > 0.1, "dropout does something"
    draws = []
    for chunk in (0, 1, 0):
        with keyed(chunk):
            draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_the_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with keyed(0):
        torch.rand(7)
    assert torch.equal(torch.rand(3), expected)


def test_running_statistics_move_once_a_chunk_and_stay_when_frozen() -> None:
    config = EncoderConfig(name="resnet10t", dim=4)
    chunks = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(3)
    counted = []
    for frozen in (False, True):
        encoder = encoders.build(config, channels=3, image_size=32)
        encoder.freeze_statistics(frozen)
        embeddings = gradient_cache.embed(encoder, chunks, plainly)
        gradient_cache.backward(encoder, chunks, torch.ones_like(embeddings), plainly)
        counted.append(int(encoders.batch_norms(encoder)[0].num_batches_tracked))
    assert counted == [2, 0]


@pytest.mark.parametrize(("rows", "micro_batch", "sizes"), [(9, 4, [3, 3, 3]), (8, 4, [3, 3, 2]), (0, 4, [0, 0, 0])])
def test_every_rank_has_as_many_chunks_as_the_one_with_most_images(
    rows: int, micro_batch: int, sizes: list[int]
) -> None:
    assert [len(chunk) for chunk in gradient_cache.split(torch.zeros(rows, 2), micro_batch, 9)] == sizes


def trained(rank: int, world: int, settings: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Losses of a training, and its last weights."""
    config = DIGITS.replace(**settings)
    *steps, last = loop.train(config, datasets.load(config.data), device=CPU)
    assert isinstance(last, loop.EpochReport)
    weights = torch.cat([parameter.detach().flatten()[:20] for parameter in last.encoder.parameters()])
    return [event.metrics["train/loss"] for event in steps], weights.tolist()


RUNS: dict[str, dict[str, Any]] = {
    "proxies": {"loss.name": "proxy_anchor"},
    "memory and rho": {"loss.name": "margin", "loss.miner": "random", "loss.rho": 0.3, "memory.size": 100},
    "thaw and average": {"optim.frozen_backbone": 0.5, "optim.ema": 0.5},
    "frozen BatchNorm": {"encoder.name": "resnet10t", "encoder.batch_norm": "frozen", "data.image_size": 8},
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("world", [1, 2])
def test_a_training_by_chunks_is_the_plain_one(run: str, world: int) -> None:
    losses_alone, weights_alone = trained(0, 1, RUNS[run])
    by_chunks = RUNS[run] | {"train.micro_batch": 7}
    start: Callable[..., Any] = trained
    found = [start(0, 1, by_chunks)] if world == 1 else ranks.run(2, start, by_chunks)
    for step_losses, weights in found:
        assert step_losses[:3] == pytest.approx(losses_alone[:3], rel=1e-5)
        assert step_losses == pytest.approx(losses_alone, rel=1e-2)
        assert weights == pytest.approx(weights_alone, abs=1e-3)

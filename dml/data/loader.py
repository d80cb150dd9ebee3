"""Batches as tensors: this rank's share of each training step, and the rows of an evaluation in order."""

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dml.config import Config
from dml.data import sampler
from dml.data.images import Transform
from dml.data.imageset import ImageSet

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Batch:
    """Images of one step on one rank."""

    images: Tensor
    """(b, channels, S, S) in [0, 255], uint8 or float32: `images.normalise` makes them the encoder's input."""
    labels: Tensor
    """int64 (b,), dense in the split."""
    indices: Tensor
    """int64 (b,), positions in the split."""


def batches(
    data: ImageSet,
    config: Config,
    plan: Indices,
    *,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    pinned: bool = False,
) -> Generator[Batch, None, None]:
    """This rank's share of an epoch's global batches, augmented.

    Files are read ahead by threads, which end when the iterator is exhausted or closed.

    Args:
        data: the training split.
        config: augmentation and seed.
        plan: int64 (steps, B), positions in the split: `sampler.plan`, or its rows from a step on.
        epoch: from 0; the augmentation depends on it.
        rank: whose share.
        world: how many share.
        pinned: images in page-locked memory, for training on a GPU.

    Raises:
        DataError: an image that is not readable.
    """
    shares = [sampler.rank_slice(global_batch, rank, world) for global_batch in plan]
    return _made(data, shares, Transform(config.data, (config.train.seed, epoch)), pinned)


def eval_batches(data: ImageSet, config: Config, *, rank: int = 0, world: int = 1) -> Generator[Batch, None, None]:
    """This rank's rows of the split in order, each exactly once over all ranks, config.evaluate.batch at a time.

    Raises:
        DataError: an image that is not readable.
    """
    rows, size = sampler.rank_slice(np.arange(len(data)), rank, world), config.evaluate.batch
    shares = [rows[start : start + size] for start in range(0, len(rows), size)]
    return _made(data, shares, Transform(config.data), pinned=False)


def _made(
    data: ImageSet, shares: Sequence[Indices], transform: Transform, pinned: bool
) -> Generator[Batch, None, None]:
    with contextlib.closing(data.inputs(shares, transform, pinned=pinned)) as inputs:
        for chosen, images in zip(shares, inputs, strict=True):
            # Copies, so that no batch is a window on the labels or the plan.
            yield Batch(images, torch.from_numpy(data.labels_N[chosen]), torch.from_numpy(chosen.copy()))

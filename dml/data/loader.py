"""Batches as tensors: this rank's share of each training step, and the rows of an evaluation in order."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dml.config import Config
from dml.data import sampler
from dml.data.images import Images, augment, to_input
from dml.data.imageset import ImageSet

Indices = npt.NDArray[np.int64]

_AHEAD = 2  # batches held ready, beside the one being made


@dataclass(frozen=True, eq=False)
class Batch:
    """Images of one step on one rank."""

    images: Tensor
    """float32 (b, channels, S, S), normalised."""
    labels: Tensor
    """int64 (b,), dense in the split."""
    indices: Tensor
    """int64 (b,), positions in the split."""


def batches(
    data: ImageSet, config: Config, plan: Indices, *, epoch: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """This rank's share of an epoch's global batches, augmented.

    Files are read ahead on a background thread, which ends when the iterator is exhausted or closed.

    Args:
        data: the training split.
        config: augmentation and seed.
        plan: int64 (steps, B), positions in the split: `sampler.plan`, or its rows from a step on.
        epoch: from 0; the augmentation depends on it.
        rank: whose share.
        world: how many share.

    Raises:
        DataError: an image that is not readable.
    """
    seed = config.train.seed

    def training(images: Images, indices: Indices) -> Tensor:
        return augment(images, config.data, seed=seed, epoch=epoch, indices=indices)

    def made() -> Iterator[Batch]:
        for global_batch in plan:
            chosen = sampler.rank_slice(global_batch, rank, world)
            yield _batch(data, chosen, data.inputs(chosen, training))

    return made() if data.in_memory else _ahead(made())


def eval_batches(data: ImageSet, config: Config, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """This rank's rows of the split in order, each exactly once over all ranks, config.evaluate.batch at a time.

    Raises:
        DataError: an image that is not readable.
    """

    def evaluation(images: Images, _: Indices) -> Tensor:
        return to_input(images, config.data)

    def made() -> Iterator[Batch]:
        rows = sampler.rank_slice(np.arange(len(data)), rank, world)
        for start in range(0, len(rows), config.evaluate.batch):
            chosen = rows[start : start + config.evaluate.batch]
            yield _batch(data, chosen, data.inputs(chosen, evaluation))

    return made() if data.in_memory else _ahead(made())


def _batch(data: ImageSet, chosen: Indices, images: Tensor) -> Batch:
    # Copies, so that no batch is a window on the labels or the plan.
    return Batch(images, torch.from_numpy(data.labels_N[chosen]), torch.from_numpy(chosen.copy()))


def _ahead(source: Iterator[Batch]) -> Iterator[Batch]:
    """What source yields, made on a background thread; its exceptions are raised here."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(_AHEAD)
    closed = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def produce() -> None:
        try:
            for batch in source:
                put(batch)
                if closed.is_set():
                    return
            put(None)
        except BaseException as error:  # it belongs to whoever reads the batches
            put(error)

    thread = threading.Thread(target=produce, name="dml-batches", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()

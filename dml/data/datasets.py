"""The datasets by name, and their class-disjoint train, val and test splits."""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from dml.config import BatchConfig, DataConfig
from dml.data import sampler
from dml.data import splits as rule
from dml.data.folders import image_folder
from dml.data.glyphs import glyphs
from dml.data.images import resize
from dml.data.imageset import Collection, DataError, ImageSet, Memory, digest
from dml.names import unknown

__all__ = ["DATASETS", "Collection", "DataError", "ImageSet", "Splits", "check", "digits", "load", "whole"]

_log = logging.getLogger(__name__)


def digits(config: DataConfig) -> Collection:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels scaled up to the image size; a toy of ten classes."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    pixels = resize(small, config.image_size, config.image_size).expand(-1, config.channels, -1, -1).contiguous()
    labels_N = np.asarray(bunch.target, dtype=np.int64)
    identity = digest(pixels.numpy().tobytes(), labels_N.tobytes())
    return Collection(labels_N, tuple(f"digit {d}" for d in range(10)), Memory(pixels), identity, toy=True)


DATASETS: dict[str, Callable[[DataConfig], Collection]] = {
    "glyphs": glyphs,
    "digits": digits,
    "image_folder": image_folder,
}


@dataclass(frozen=True, eq=False)
class Splits:
    """A dataset in three splits that have no class in common."""

    train: ImageSet
    val: ImageSet
    """Every selection is made here."""
    test: ImageSet
    """Embedded once, for the final report."""
    set_aside: int
    """Classes with a single sample, which are in no split: they have no positive pair."""
    toy: bool
    """True where the held-out classes are too few for OPIS to mean much."""
    fingerprint: str
    """SHA-256 over class names, the split of each, and the identity of the samples; data.train_on_val, which moves val
    classes to train, leaves it as it is."""


@functools.lru_cache(maxsize=4)
def load(config: DataConfig) -> Splits:
    """The dataset that config names, split; kept in memory for the next call with equal settings.

    Classes with one sample are set aside with a warning.

    Raises:
        ValueError: an unknown dataset.
        DataError: data that cannot be read.
    """
    if config.dataset not in DATASETS:
        raise ValueError(unknown("dataset", config.dataset, DATASETS))
    data = DATASETS[config.dataset](config)
    counts_C = np.bincount(data.labels_N, minlength=len(data.classes))
    usable = [name for name, count in zip(data.classes, counts_C, strict=True) if count > 1]
    set_aside = len(data.classes) - len(usable)
    if set_aside:
        _log.warning(
            "%s: %d of %d classes have a single sample and are set aside", config.dataset, set_aside, len(data.classes)
        )
    fractions = {"val_fraction": config.val_fraction, "test_fraction": config.test_fraction}
    split_of = data.assigned or rule.assign(usable, **fractions, seed=config.split_seed)
    label_of = {name: label for label, name in enumerate(data.classes)}

    def members(split: str, split_of: Mapping[str, str]) -> list[str]:
        return [name for name in usable if split_of[name] == split]

    used = rule.lend(split_of, share=config.train_on_val, seed=config.split_seed)
    parts = {split: data.take([label_of[name] for name in members(split, used)]) for split in rule.SPLITS}
    listed = (text for split in rule.SPLITS for text in (split, *members(split, split_of)))
    return Splits(**parts, set_aside=set_aside, toy=data.toy, fingerprint=digest(data.identity, *listed))


def whole(config: DataConfig) -> ImageSet:
    """Every image of the dataset that config names, whatever its split; classes with one sample included.

    Raises:
        ValueError: an unknown dataset.
        DataError: data that cannot be read.
    """
    if config.dataset not in DATASETS:
        raise ValueError(unknown("dataset", config.dataset, DATASETS))
    data = DATASETS[config.dataset](config)
    return data.take(range(len(data.classes)))


def check(splits: Splits, batch: BatchConfig) -> None:
    """Refuse splits that cannot be trained and judged with these batches.

    Raises:
        DataError: a split with fewer than two classes, fewer than P classes to train on, K larger than every class, or
            what the sampler refuses (`sampler.check`).
    """
    sizes = {name: len(getattr(splits, name).classes) for name in rule.SPLITS}
    for name, size in sizes.items():
        if size < 2:
            others = ", ".join(f"{other} has {count}" for other, count in sizes.items() if other != name)
            raise DataError(
                f"the {name} split {'has a single class' if size else 'is empty'}: of {sum(sizes.values())} classes "
                f"with two or more images {others}. Each split needs 2 or more, since one class has no negatives: "
                "set data.val_fraction and data.test_fraction above 0 and their sum below 1, or add classes"
            )
    grouped = batch.sampler != "random"
    if grouped and sizes["train"] < batch.classes:
        aside = f" ({splits.set_aside} classes with a single image were set aside)" if splits.set_aside else ""
        raise DataError(
            f"batch.classes is {batch.classes}, but only {sizes['train']} classes can be trained on{aside}; "
            f"valid: 2 to {sizes['train']}, or smaller data.val_fraction and data.test_fraction"
        )
    try:
        sampler.check(splits.train.labels_N, batch, splits.train.classes)
    except ValueError as error:
        raise DataError(str(error)) from None
    counts_C = np.bincount(splits.train.labels_N)
    largest = int(counts_C.argmax())
    if grouped and batch.samples > counts_C[largest]:
        raise DataError(
            f"batch.samples is {batch.samples}, more than any class has: the largest, "
            f"{splits.train.classes[largest]!r}, has {counts_C[largest]} images; valid: 2 to {counts_C[largest]}"
        )

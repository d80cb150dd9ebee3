"""Labelled images: a whole dataset before its split (`Collection`) and one split of it (`ImageSet`)."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dml.data.images import ImageError, Images, decode

Indices = npt.NDArray[np.int64]
Transform = Callable[[Images, Indices], Tensor]
"""(images, their indices) -> float32 (B, channels, S, S); an image's result must not depend on its neighbours."""


class DataError(ValueError):
    """Data that cannot be trained or evaluated on; the message names class, file or split, and what would be valid."""


class Source(Protocol):
    """Where the pixels of a collection come from."""

    @property
    def in_memory(self) -> bool:
        """True if reading costs no more than an index."""
        ...

    def images(self, rows: Indices) -> Images:
        """uint8 images (c, H, W) of these rows, as one batch where all have one size."""
        ...

    def inputs(self, rows: Indices, indices: Indices, transform: Transform) -> Tensor:
        """transform(images, indices) of these rows, float32 (B, channels, S, S)."""
        ...


@dataclass(frozen=True, eq=False)
class Memory:
    """Images of one size in one uint8 tensor (N, c, H, W)."""

    pixels: Tensor

    @property
    def in_memory(self) -> bool:
        """True."""
        return True

    def images(self, rows: Indices) -> Tensor:
        """uint8 (B, c, H, W)."""
        return self.pixels[torch.from_numpy(rows)]

    def inputs(self, rows: Indices, indices: Indices, transform: Transform) -> Tensor:
        """The transform of the whole batch at once."""
        return transform(self.images(rows), indices)


@dataclass(frozen=True, eq=False)
class Files:
    """Images in files, decoded by a pool of threads when they are asked for."""

    paths: tuple[Path, ...]
    owners: tuple[str, ...]
    """Name of each file's class, for error messages."""
    channels: int
    threads: int

    @property
    def in_memory(self) -> bool:
        """False."""
        return False

    def images(self, rows: Indices) -> list[Tensor]:
        """uint8 (c, H, W) each, of any sizes.

        Raises:
            DataError: a file is no readable image.
        """
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(self._decode, rows.tolist()))

    def inputs(self, rows: Indices, indices: Indices, transform: Transform) -> Tensor:
        """The transform, image by image in the threads: no more than `threads` photographs are held in full size.

        Raises:
            DataError: a file is no readable image.
        """

        def one(position: int) -> Tensor:
            return transform([self._decode(int(rows[position]))], indices[position : position + 1])

        with ThreadPoolExecutor(self.threads) as pool:
            return torch.cat(list(pool.map(one, range(len(rows)))))

    def _decode(self, row: int) -> Tensor:
        try:
            return decode(self.paths[row], self.channels)
        except ImageError as error:
            raise DataError(f"class {self.owners[row]!r}: {self.paths[row]}: {error}") from error


@dataclass(frozen=True, eq=False)
class ImageSet:
    """The images of one split, with labels that are dense in it."""

    labels_N: Indices
    """int64, 0..C-1, each present."""
    classes: tuple[str, ...]
    """Names, by label."""
    source: Source
    rows_N: Indices
    """Where each image is in the source."""

    def __len__(self) -> int:
        return len(self.labels_N)

    def subset(self, positions: Indices) -> "ImageSet":
        """These images in this order, their labels dense again."""
        kept, labels_N = np.unique(self.labels_N[positions], return_inverse=True)
        classes = tuple(self.classes[label] for label in kept)
        return ImageSet(labels_N.astype(np.int64), classes, self.source, self.rows_N[positions])

    @property
    def in_memory(self) -> bool:
        """True if reading images costs no more than an index (then there is nothing to read ahead)."""
        return self.source.in_memory

    def images(self, indices: npt.ArrayLike) -> Images:
        """uint8 images of these positions in the split: (B, c, H, W), or a list of (c, H, W) for files.

        Raises:
            DataError: a file is no readable image; the message names class, file and reason.
        """
        return self.source.images(self.rows_N[np.asarray(indices, dtype=np.int64)])

    def inputs(self, indices: npt.ArrayLike, transform: Transform) -> Tensor:
        """transform(images, indices), float32 (B, channels, S, S), computed where the images are read.

        Raises:
            DataError: as images.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        return self.source.inputs(self.rows_N[chosen], chosen, transform)


@dataclass(frozen=True, eq=False)
class Collection:
    """Every image of a dataset, before its classes are split."""

    labels_N: Indices
    """int64, 0..C-1."""
    classes: tuple[str, ...]
    """Names, by label; no two are the same."""
    source: Source
    identity: str
    """Digest of the samples in their order: which images these are."""
    assigned: Mapping[str, str] | None = None
    """Split of each class by name, where the dataset brings its own."""
    toy: bool = False
    """True where so few classes are held out that a figure such as OPIS says little."""

    def take(self, members: Sequence[int]) -> ImageSet:
        """The images of these classes, their labels dense in the order of members."""
        dense_C = np.full(len(self.classes), -1, dtype=np.int64)
        dense_C[list(members)] = np.arange(len(members))
        labels_N = dense_C[self.labels_N]
        rows = np.flatnonzero(labels_N >= 0)
        return ImageSet(labels_N[rows], tuple(self.classes[c] for c in members), self.source, rows)


def digest(*parts: str | bytes) -> str:
    """SHA-256 over parts, each preceded by its length, so that no two lists of parts run into each other."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "big") + data)
    return total.hexdigest()

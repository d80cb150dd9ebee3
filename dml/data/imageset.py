"""Labelled images: a whole dataset before its split (`Collection`) and one split of it (`ImageSet`)."""

import hashlib
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dml.data.images import ImageError, Images, Transform, decode

Indices = npt.NDArray[np.int64]

_AHEAD = 2  # batches in the making or ready, beside the one that is waited for
_AT_ONCE = 16  # images that a thread takes at most: handing over one by one costs a tenth of their decoding


class DataError(ValueError):
    """Data that cannot be trained or evaluated on; the message names class, file or split, and what would be valid."""


class Source(Protocol):
    """Where the pixels of a collection come from."""

    def images(self, rows: Indices) -> Images:
        """uint8 images (c, H, W) of these rows, as one batch where all have one size."""
        ...

    def inputs(
        self, batches: Iterable[tuple[Indices, Indices]], transform: Transform, *, pinned: bool = False
    ) -> Generator[Tensor, None, None]:
        """transform(images of the rows, indices) of each batch (rows, indices): (B, channels, S, S)."""
        ...


@dataclass(frozen=True, eq=False)
class Memory:
    """Images of one size in one uint8 tensor (N, c, H, W)."""

    pixels: Tensor

    def images(self, rows: Indices) -> Tensor:
        """uint8 (B, c, H, W)."""
        return self.pixels[torch.from_numpy(rows)]

    def inputs(
        self, batches: Iterable[tuple[Indices, Indices]], transform: Transform, *, pinned: bool = False
    ) -> Generator[Tensor, None, None]:
        """The transform of a whole batch at once, when it is asked for: there is nothing to read ahead."""
        for rows, indices in batches:
            made = transform(self.images(rows), indices)
            yield made.pin_memory() if pinned else made


@dataclass(frozen=True, eq=False)
class Files:
    """Images in files, decoded by a pool of threads when they are asked for."""

    paths: tuple[Path, ...]
    owners: tuple[str, ...]
    """Name of each file's class, for error messages."""
    channels: int
    threads: int | None = None
    """How many decode; None for as many as torch computes with, which are the CPUs of this rank."""

    def images(self, rows: Indices) -> list[Tensor]:
        """uint8 (c, H, W) each, of any sizes.

        Raises:
            DataError: a file is no readable image.
        """
        with self._pool() as pool:
            return list(pool.map(self._decode, rows.tolist()))

    def inputs(
        self, batches: Iterable[tuple[Indices, Indices]], transform: Transform, *, pinned: bool = False
    ) -> Generator[Tensor, None, None]:
        """The transform, image by image in the threads, which read ahead of whoever takes the batches.

        A thread holds one photograph in full size, and goes from batch to batch without waiting for others. The
        threads end when the iterator is exhausted or closed.

        Raises:
            DataError: a file is no readable image.
        """

        @torch.inference_mode()
        def fill(place: Tensor, rows: Indices, indices: Indices) -> None:
            place.copy_(transform((self._decode(row, transform.enough) for row in rows.tolist()), indices))

        threads = self.threads or torch.get_num_threads()
        pool = self._pool()
        waiting: deque[tuple[Tensor, list[Future[None]]]] = deque()

        def taken() -> Tensor:
            batch, parts = waiting.popleft()
            for part in parts:
                part.result()
            return batch

        try:
            for rows, indices in batches:
                # Channels last, as the decoder gives and the encoder takes them; filled where it is decoded.
                shape = (len(rows), *transform.shape)
                batch = torch.empty(shape, dtype=transform.dtype, memory_format=torch.channels_last, pin_memory=pinned)
                # At least two parts a thread among the batches in the making, so that none waits for another.
                each = max(1, min(_AT_ONCE, (_AHEAD + 1) * len(rows) // (2 * threads)))
                cuts = range(each, len(rows), each)
                parts = zip(batch.split(each), np.split(rows, cuts), np.split(indices, cuts), strict=True)
                waiting.append((batch, [pool.submit(fill, *part) for part in parts]))
                if len(waiting) > _AHEAD:
                    yield taken()
            while waiting:
                yield taken()
        finally:
            pool.shutdown(cancel_futures=True)

    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads or torch.get_num_threads(), "dml-images", _compute_alone)

    def _decode(self, row: int, enough: int | None = None) -> Tensor:
        try:
            return decode(self.paths[row], self.channels, enough=enough)
        except ImageError as error:
            raise DataError(f"class {self.owners[row]!r}: {self.paths[row]}: {error}") from error


def _compute_alone() -> None:
    """Keeps torch, in this thread, from starting threads of its own beside those that decode."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    torch.get_num_threads()  # torch sets its number in a thread at first use, and would do so after this
    threadpool_limits(1, "openmp")


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

    def images(self, indices: npt.ArrayLike) -> Images:
        """uint8 images of these positions in the split: (B, c, H, W), or a list of (c, H, W) for files.

        Raises:
            DataError: a file is no readable image; the message names class, file and reason.
        """
        return self.source.images(self.rows_N[np.asarray(indices, dtype=np.int64)])

    def inputs(
        self, batches: Iterable[npt.ArrayLike], transform: Transform, *, pinned: bool = False
    ) -> Generator[Tensor, None, None]:
        """transform(images, indices) of each batch of positions: (B, channels, S, S), files read ahead.

        Args:
            batches: positions in the split.
            transform: an image's result must not depend on its neighbours.
            pinned: in page-locked memory, from which a GPU copies while it computes.

        Raises:
            DataError: as images.
        """
        chosen = (np.asarray(batch, dtype=np.int64) for batch in batches)
        return self.source.inputs(((self.rows_N[indices], indices) for indices in chosen), transform, pinned=pinned)


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

"""The actor of bulk embedding: a shard of a data set to a Parquet file, whatever its images are like."""

import functools
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray.util
import torch
from torch import Tensor

from cluster import embedding_table, registry, session
from cluster.embedding_table import SHARD, Made
from cluster.tracking import TrackingError
from dml import checkpoint, evaluate
from dml.config import DataConfig
from dml.data import datasets, images
from dml.data.images import ImageError
from dml.data.imageset import DataError

_AHEAD = 2  # batches that are decoded beside the one that is embedded


@dataclass(frozen=True)
class Model:
    """Where each actor finds the model.

    Attributes:
        place: a checkpoint folder that every node sees, or models:/NAME/VERSION, which a node fetches for itself.
        store: tracking URI of the registry with such a version.
    """

    place: str
    store: str = ""

    def load(self) -> checkpoint.Checkpoint:
        """Raises CheckpointError, and what `registry.fetch` does."""
        if self.store:
            os.environ["MLFLOW_TRACKING_URI"] = self.store
        return checkpoint.load(registry.fetch(self.place)[0])


@dataclass(frozen=True, eq=False)
class Subject:
    """Images to embed.

    Attributes:
        config: their transform, and, where root is empty, the dataset.
        root: the folder that ids are paths in; empty for a dataset.
        ids: one an image, in order.
        labels: class of each; None where none is known.
        identity: digest of which images these are.
        unnamed: files without an id, as they can be shown, and why.
    """

    config: DataConfig
    root: str
    ids: Sequence[str]
    labels: Sequence[str | None]
    identity: str
    unnamed: Sequence[tuple[str, str]] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, start: int, count: int) -> tuple[int, list[str], list[str | None]]:
        """Start, ids and labels of count images from a place on."""
        return start, list(self.ids[start : start + count]), list(self.labels[start : start + count])


@dataclass(frozen=True)
class Shard:
    """A part of a subject: its number, the place of its first image, ids and labels."""

    number: int
    start: int
    ids: list[str]
    labels: list[str | None]


class Embedder:
    """Embeds shards with one model, and writes each into a file of its own.

    Args:
        model: that embeds.
        config: of the images.
        root: as in Subject.
        made: for the files' metadata.
        out: folder of the files.
        batch: images of a forward pass.
    """

    def __init__(self, model: Model, config: DataConfig, root: str, made: Made, out: str, batch: int) -> None:
        self._device = session.use_device()
        self._model = model
        self._config, self._root, self._made, self._out, self._batch = config, root, made, Path(out), batch
        # Before the threads that decode: each would make it for itself.
        self._source = None if root else datasets.DATASETS[config.dataset](config).source
        self._pool = ThreadPoolExecutor(max(1, torch.get_num_threads()), "decode")

    def __call__(self, shards: dict[str, Any]) -> dict[str, Any]:
        """Writes a shard; gives its images, and in one line why it could not be written.

        As a value: Ray Data would drown an error in its own, and says nothing but that of one in __init__.
        """
        [shard] = shards["shard"]
        try:
            return {"images": [self._write(shard)], "wrong": [""]}
        except (ValueError, OSError, TrackingError) as error:
            return {"images": [0], "wrong": [str(error)]}

    def _write(self, shard: Shard) -> int:
        rows: list[npt.NDArray[np.float32]] = []
        kept: list[int] = []
        bad: list[tuple[str, str]] = []
        for places, inputs in self._decoded(shard):
            good = [(place, each) for place, each in zip(places, inputs, strict=True) if isinstance(each, Tensor)]
            bad += [(shard.ids[p], each) for p, each in zip(places, inputs, strict=True) if isinstance(each, str)]
            if good:
                kept += [place for place, _ in good]
                rows.append(self._embed([each for _, each in good]))
        rows_BD = np.concatenate(rows) if rows else np.empty((0, self._made.dim), np.float32)
        ids, labels = [shard.ids[place] for place in kept], [shard.labels[place] for place in kept]
        self._save(shard.number, embedding_table.table(self._made, ids, labels, rows_BD), bad)
        return len(shard.ids)

    @functools.cached_property
    def _loaded(self) -> checkpoint.Checkpoint:
        loaded = self._model.load()
        loaded.encoder.to(self._device)
        return loaded

    @torch.inference_mode()
    def _embed(self, inputs: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        with evaluate.autocast(self._loaded.config, self._device):
            embedded: Tensor = self._loaded.encoder(torch.stack(list(inputs)).to(self._device, non_blocking=True))
        return embedded.float().cpu().numpy()

    def _decoded(self, shard: Shard) -> Iterator[tuple[Sequence[int], list[Tensor | str]]]:
        """Batches of places and their inputs, or the reason why there is none, decoded ahead by threads."""
        waiting: list[tuple[range, list[Future[Tensor | str]]]] = []
        for start in range(0, len(shard.ids), self._batch):
            places = range(start, min(start + self._batch, len(shard.ids)))
            waiting.append((places, [self._pool.submit(self._input, shard, place) for place in places]))
            if len(waiting) > _AHEAD:
                first, futures = waiting.pop(0)
                yield first, [future.result() for future in futures]
        for first, futures in waiting:
            yield first, [future.result() for future in futures]

    def _input(self, shard: Shard, place: int) -> Tensor | str:
        config = self._config
        if self._source is not None:
            return images.to_input(self._source.images(np.array([shard.start + place])), config)[0]
        try:
            data = read(Path(self._root, shard.ids[place]), self._root)
            decoded = images.decode(data, config.channels, enough=images.Transform(config).enough)
            return images.to_input([decoded], config)[0]
        except ImageError as error:
            return str(error)

    def _save(self, number: int, table: Any, bad: Sequence[tuple[str, str]]) -> None:
        """The reasons first: a shard that is there is whole."""
        import pyarrow.parquet as pq

        if bad:
            self._replace(f"bad-{number:06d}.json", lambda path: path.write_text(json.dumps(bad)))
        self._replace(SHARD.format(number), lambda path: pq.write_table(table, path))

    def _replace(self, name: str, write: Any) -> None:
        new = self._out / f".{name}.new"
        write(new)
        new.replace(self._out / name)


def read(path: Path, root: str) -> bytes:
    """The bytes of an image file.

    Args:
        path: that was listed.
        root: the folder that was listed.

    Raises:
        ImageError: the file is no longer there.
        DataError: the storage fails or is gone, which says nothing of the image.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        reason = str(error.strerror).lower()
        # What is not mounted is an empty folder, or none.
        if isinstance(error, FileNotFoundError) and any(Path(root).glob("*")):
            raise ImageError(reason) from error
        raise DataError(
            f"data: {path} cannot be read on node {ray.util.get_node_ip_address()}: {reason}; what is embedded stays, "
            "and the same command goes on"
        ) from error

"""The actor of bulk embedding: a shard of a data set to a Parquet file, whatever its images are like."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster import embedding_table, session
from cluster.embedding_table import SHARD, Made
from dml import checkpoint, evaluate
from dml.config import DataConfig
from dml.data import datasets, images
from dml.data.images import ImageError

_AHEAD = 2  # batches that are decoded beside the one that is embedded


@dataclass(frozen=True, eq=False)
class Subject:
    """Images to embed.

    Attributes:
        config: their transform, and, where root is empty, the dataset.
        root: the folder that ids are paths in; empty for a dataset.
        ids: one an image, in order.
        labels: class of each; None where none is known.
        identity: digest of which images these are.
    """

    config: DataConfig
    root: str
    ids: Sequence[str]
    labels: Sequence[str | None]
    identity: str

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
        model: a checkpoint folder.
        config: of the images.
        root: as in Subject.
        made: for the files' metadata.
        out: folder of the files.
        batch: images of a forward pass.
    """

    def __init__(self, model: str, config: DataConfig, root: str, made: Made, out: str, batch: int) -> None:
        self._device = session.use_device()
        loaded = checkpoint.load(model)
        self._encoder = loaded.encoder.to(self._device).eval()
        self._model = loaded.config
        self._config, self._root, self._made, self._out, self._batch = config, root, made, Path(out), batch
        # Before the threads that decode: each would make it for itself.
        self._source = None if root else datasets.DATASETS[config.dataset](config).source
        self._pool = ThreadPoolExecutor(max(1, torch.get_num_threads()), "decode")

    def __call__(self, shards: dict[str, Any]) -> dict[str, Any]:
        """Writes shards; gives the images of each."""
        return {"images": np.array([self._write(shard) for shard in shards["shard"]])}

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

    @torch.inference_mode()
    def _embed(self, inputs: Sequence[Tensor]) -> npt.NDArray[np.float32]:
        with evaluate.autocast(self._model, self._device):
            embedded: Tensor = self._encoder(torch.stack(list(inputs)).to(self._device, non_blocking=True))
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
        path = Path(self._root, shard.ids[place])
        try:
            decoded = images.decode(path, config.channels, enough=images.Transform(config).enough)
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

"""From what a request carries, images and embeddings, to embeddings of the model that is served."""

import asyncio
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from dml.data.images import ImageError, probe
from dml.names import unknown
from serve import access, schemas
from serve.batching import Backlog, Batcher
from serve.limits import Limits
from serve.live import Live
from serve.model import Embedder, Source, label
from serve.schemas import ApiError

Result = TypeVar("Result")
Item = str | bytes | Sequence[float]
"""A data URI or bare base64 of an image, an image file, or an embedding."""
Input = torch.Tensor | npt.NDArray[np.float32]
"""A decoded image, or an embedding (D,) of unit norm."""
HANDED = 4
"""Images handed to a decoding thread at a time: one alone costs as much to hand over as a small one to decode."""
FAILURES = 5
"""Forward passes that fail one after the other before the replica is replaced, as after an error of a GPU."""


class Engine:
    """The model that is served, and the threads that decode for it and run it.

    Args:
        source: where each request finds the model; started and stopped with the engine.
        limits: the most that a request may carry.
        threads: that decode images, beside the one that runs the model.
    """

    def __init__(self, source: Source, limits: Limits | None = None, *, threads: int | None = None) -> None:
        self.source = source
        self.limits = limits or Limits()
        self._threads = threads or os.cpu_count() or 1
        self._backlog = Backlog(self.limits)
        self.live = Live()
        """What verifications measured."""

    def start(self) -> None:
        """Begins to look for the model, without waiting for it."""
        self._decoding = ThreadPoolExecutor(self._threads, "decode")
        self._batcher = Batcher()
        self._batcher.start()
        self.source.start()

    def stop(self) -> None:
        """Ends the threads; requests under way are finished."""
        self.source.stop()
        self._decoding.shutdown()
        self._batcher.stop()

    def check(self) -> None:
        """Of a replica's health.

        Raises:
            RuntimeError: it can no longer embed, and must be replaced.
        """
        if not self._batcher.alive:
            raise RuntimeError("the thread that runs the model has ended")
        if self._batcher.failures >= FAILURES:
            raise RuntimeError(f"the model failed {self._batcher.failures} times in a row")

    def model(self, wanted: str | None = None) -> Embedder:
        """The model to answer one request with: asked for once, so that a change-over does not mix two.

        Args:
            wanted: the name that the client gave, with or without a version.

        Raises:
            ApiError: none is loaded, or another one is.
        """
        model, trouble = self.source.current, self.source.trouble
        if model is None:
            raise ApiError(503, _absent(trouble), code="no_champion")
        served = [model.name, label(model)]
        if wanted is not None and wanted not in served:
            raise ApiError(404, unknown("model", wanted[:100], served), param="model", code="model_not_found")
        return model

    async def embed(self, model: Embedder, items: Sequence[tuple[str, Item]]) -> npt.NDArray[np.float32]:
        """Embeddings (B, D) of unit norm, in the order of the items.

        Args:
            model: from `model`.
            items: each with its name in messages, e.g. input[3].

        Raises:
            ApiError: too many images, or an item that is neither a usable image nor an embedding of this model.
        """
        images = sum(isinstance(item, str | bytes) for _, item in items)
        if images > self.limits.images:
            message = f"{images} images; at most {self.limits.images} a request are allowed"
            raise ApiError(413, message, param=items[0][0].partition("[")[0], code="too_many_images")
        with self._backlog.admitted(images):
            access.saw(label(model), images)
            inputs = await self._decoded(model, items)
            rows = [value for value in inputs if isinstance(value, torch.Tensor)]
            embedded = await self._batcher.embed(model, rows) if rows else np.empty((0, model.dim), np.float32)
        found = iter(embedded)
        return np.stack([next(found) if isinstance(value, torch.Tensor) else value for value in inputs])

    async def _decoded(self, model: Embedder, items: Sequence[tuple[str, Item]]) -> list[Input]:
        handed = [items[start : start + HANDED] for start in range(0, len(items), HANDED)]
        done = await self.in_threads(lambda some: [pre(model, name, item, self.limits) for name, item in some], handed)
        return [value for some in done for value in some]

    async def in_threads(self, function: Callable[[Any], Result], items: Iterable[Any]) -> list[Result]:
        """The function of every item, in the threads that decode; the first error drops what has not begun."""
        loop = asyncio.get_running_loop()
        futures = [loop.run_in_executor(self._decoding, function, item) for item in items]
        try:
            return await asyncio.gather(*futures)
        finally:
            for future in futures:
                future.cancel()


def pre(model: Embedder, param: str, item: Item, limits: Limits) -> Input:
    """One item as the tensor that the model takes; an embedding as a row (D,) of unit norm.

    Raises:
        ApiError: no image, or one beyond the limits (nothing is decoded before these are checked); no embedding of
            this model's dimension.
    """
    if not isinstance(item, str | bytes):
        return _unit(model, param, item)
    most = limits.image_bytes
    data = (
        schemas.image_bytes(item, param, most=most)
        if isinstance(item, str)
        else schemas.file_bytes(item, param, most=most)
    )
    try:
        width, height = probe(data)
        if width * height > limits.pixels:
            size = f"{width} x {height} pixels"
            message = f"{param} has {size}; at most {limits.pixels:,} are allowed"
            raise ApiError(413, message, param=param, code="too_many_pixels")
        if max(width, height) > limits.aspect * min(width, height):
            message = f"{param} is {width} x {height}; its sides may differ by a factor of {limits.aspect} at most"
            raise ApiError(422, message, param=param, code="image_too_elongated")
        return model.decode(data)
    except ImageError as error:
        if isinstance(error.__cause__, Image.DecompressionBombError):  # so many that Pillow gives no size
            message = f"{param} has far more than the {limits.pixels:,} pixels that are allowed"
            raise ApiError(413, message, param=param, code="too_many_pixels") from error
        raise ApiError(422, f"{param} is unreadable: {error}", param=param, code="unreadable_image") from error


def _unit(model: Embedder, param: str, values: Sequence[float]) -> npt.NDArray[np.float32]:
    if len(values) != model.dim:
        message = f"{param} has {len(values)} numbers; an embedding of {label(model)} has {model.dim}"
        raise ApiError(422, message, param=param, code="wrong_dimension")
    row = np.asarray(values, dtype=np.float64)
    with np.errstate(over="ignore"):  # a norm that is not finite is refused below
        norm = float(np.linalg.norm(row))
    if not np.isfinite(norm) or norm == 0:
        message = f"{param} has the norm {norm:g}; an embedding has finite numbers that are not all 0"
        raise ApiError(422, message, param=param, code="not_an_embedding")
    return (row / norm).astype(np.float32)


def _absent(trouble: str | None) -> str:
    if trouble is not None:
        return f"no champion yet: {trouble}; the server's log says more"
    return "no champion yet: `python -m tune.search` trains and registers one, and it is then served without a restart"

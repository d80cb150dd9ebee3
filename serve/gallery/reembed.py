"""Embedding a gallery's kept images by the model that is served now, while the service goes on."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from serve.engine import Engine
from serve.model import label
from serve.schemas import ApiError

if TYPE_CHECKING:
    from serve.gallery.deployment import Asked

log = logging.getLogger(__name__)

Embed = Callable[[Sequence[tuple[str, bytes]]], Awaitable[npt.NDArray[np.float32]]]
"""Image files, each with its name in messages, to embeddings (B, D) of unit norm."""

BATCH = 16
"""Images that are embedded together, so that requests get their turn between."""
SETTLE_S = 10.0
"""Seconds that a model must stay before galleries change over to it: replicas change one after the other."""
TRIES = 5
"""Times that a busy replica is asked for a batch."""
PASSING = (429, 503)
"""Statuses of what passes by itself."""


async def reembed(galleries: "Asked", name: str, model: str, embed: Embed, wanted: Callable[[], bool]) -> None:
    """Embeds a claimed gallery's images, and changes it over.

    Args:
        galleries: that `claim` was asked of.
        name: of the gallery.
        model: label of the model that embeds.
        embed: by that model.
        wanted: looked at between batches; False ends it where it is.

    Raises:
        ApiError: an image cannot be embedded by this model: the gallery stays as it is, and says so. Or the service is
            too busy, or the disk fails: the next `claim` goes on with what was embedded.
    """
    after, came = "", True
    try:
        while wanted():
            batch = await galleries.images(name, model, after, BATCH)
            if batch:
                came = True
                items = [(f"item {item[:100]!r}", data) for item, _, data in batch]
                rows = await _patiently(embed, items)
                digests = [digest for _, digest, _ in batch]
                await galleries.stage(name, model, dict(zip(digests, rows, strict=True)))
                after = batch[-1][0]
            elif not (missing := await galleries.finish(name, model)):
                return
            elif came:
                after, came = "", False  # once more from the start: items have come meanwhile
            else:
                raise ApiError(409, f"{missing:,} of its items have no kept image", code="gallery_of_another_model")
        await galleries.give_up(name, model, None)
    except ApiError as error:
        if error.code not in ("not_claimed", "gallery_not_found"):
            await galleries.give_up(name, model, None if error.status in PASSING else error.message)
        raise


class Background:
    """Re-embeds galleries beside the requests of a replica of the API.

    Args:
        engine: with the model.
        galleries: that are asked.
    """

    def __init__(self, engine: Engine, galleries: "Asked") -> None:
        self._engine = engine
        self._galleries = galleries
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def wake(self, name: str, *, at_once: bool = False) -> None:
        """Begins to re-embed a gallery unless it is at it; some seconds from now, if not at once."""
        if name not in self._tasks:
            task = asyncio.create_task(self._work(name, 0 if at_once else SETTLE_S))
            self._tasks[name] = task
            task.add_done_callback(lambda _: self._tasks.pop(name, None))

    async def _work(self, name: str, settle: float) -> None:
        model = self._engine.source.current
        await asyncio.sleep(settle)

        def wanted() -> bool:
            return self._engine.source.current is model

        try:
            if model is None or not wanted() or not await self._galleries.claim(name, label(model)):
                return
            log.warning("gallery %s: embedding its images by %s", name, label(model))
            embedding = model
            await reembed(
                self._galleries,
                name,
                label(model),
                lambda items: self._engine.embed(embedding, items),
                wanted,
            )
        except ApiError as error:
            log.warning("gallery %s: %s", name, error.message)
        except Exception:
            log.exception("gallery %s was not embedded anew", name)


async def _patiently(embed: Embed, items: Sequence[tuple[str, bytes]]) -> npt.NDArray[np.float32]:
    for pause in range(1, TRIES):
        try:
            return await embed(items)
        except ApiError as error:
            if error.status not in PASSING:
                raise
            await asyncio.sleep(pause)
    return await embed(items)

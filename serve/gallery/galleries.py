"""All galleries of a service, in a folder that this process alone writes to; asked asynchronously.

What goes wrong is said as an `ApiError`.
"""

import asyncio
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from serve.gallery import info, refusals, store
from serve.gallery.index import EXACT_UP_TO
from serve.gallery.info import Info
from serve.gallery.items import NAME, Item, Remove, Settings
from serve.gallery.limits import GalleryLimits
from serve.gallery.lock import FolderLock
from serve.gallery.log import sync_folder
from serve.gallery.staging import Staging
from serve.gallery.store import Add, Found, Listed, OtherDimensionError, OtherModelError, Store, TooManyItemsError
from serve.schemas import ApiError

log = logging.getLogger(__name__)

Row = npt.NDArray[np.float32]
Result = TypeVar("Result")

HALF = rf"\.{NAME}-[0-9a-f]{{32}}"
"""A gallery's folder while it is made or deleted; one that is found was left by a process that died."""
TOGETHER = 50
"""Changes that wait for the disk together at most."""


@dataclass(eq=False)
class _Open:
    """A gallery, its writer's turn, what waits to be written, and what another model has embedded of it."""

    name: str
    store: Store
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: list[tuple[Add | Remove, "asyncio.Future[int]"]] = field(default_factory=list)
    closed: bool = False
    building: bool = False
    staging: Staging | None = None


class Galleries:
    """The galleries under a folder.

    Args:
        folder: made when it is not there; locked, until `close` or the end of the process.
        limits: the most of everything.
        threads: that search.
        patience: seconds to wait for another process that has the folder.
        exact_up_to: items of a gallery that are searched one by one.

    Raises:
        WrittenElsewhereError: another process has the folder.
    """

    def __init__(
        self,
        folder: Path,
        limits: GalleryLimits | None = None,
        *,
        threads: int = 1,
        patience: float = 0.0,
        exact_up_to: int = EXACT_UP_TO,
    ) -> None:
        self._folder = folder
        self._limits = limits or GalleryLimits()
        self._threads = threads
        self._exact_up_to = exact_up_to
        self._lock = FolderLock(folder, patience)
        self._open: dict[str, _Open] = {}
        self._damaged: set[str] = set()
        self._naming = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._searching = ThreadPoolExecutor(threads, "search")
        self._writing = ThreadPoolExecutor(4, "write")
        self._building = ThreadPoolExecutor(1, "index")
        for path in sorted(folder.iterdir()):
            if re.fullmatch(HALF, path.name) and path.is_dir():
                shutil.rmtree(path)
            elif re.fullmatch(NAME, path.name) and os.path.isfile(path / store.FILE):
                self._read(path)  # whatever else lies there is somebody's

    async def names(self) -> list[str]:
        """The galleries' names, in order."""
        return sorted(self._open)

    async def create(self, name: str, keep_images: bool | None) -> bool:
        """Makes an empty gallery; False when it is there already.

        Args:
            name: NAME.
            keep_images: keep the images that are added, so that another model can embed them; None for no, or, of a
                gallery that is there, for what it does.
        """
        if not re.fullmatch(NAME, name):
            raise refusals.bad_name(name)
        async with self._naming:
            if name in self._damaged:
                raise refusals.damaged(name)
            if name in self._open:
                kept = self._open[name].store.settings.keep_images
                if keep_images not in (None, kept):
                    message = f"gallery {name!r} is there with keep_images {str(kept).lower()}, which stays as it is"
                    raise ApiError(409, message, param="keep_images", code="gallery_exists")
                return False
            if len(self._open) >= self._limits.galleries:
                message = f"there are {len(self._open)} galleries; at most {self._limits.galleries} are allowed"
                raise ApiError(409, message, param="gallery", code="too_many_galleries")
            settings = Settings(created=int(time.time()), keep_images=bool(keep_images))
            try:
                await asyncio.shield(self._spawn(self._create(name, settings)))
            except OSError as error:
                log.error("gallery %s: %s", name, error)
                raise refusals.disk_failed() from error
            return True

    async def info(self, name: str) -> Info:
        """What is known of a gallery."""
        gallery = self._find(name)
        return await self._in(self._searching, lambda: info.of(gallery.name, gallery.store, gallery.staging))

    async def delete(self, name: str) -> None:
        """Deletes a gallery with its items and images."""
        async with self._naming:
            if name in self._damaged:
                self._damaged.discard(name)
            else:
                gallery = self._find(name)
                async with gallery.turn:
                    del self._open[name]
                    gallery.closed = True
                    gallery.store.close()
            await asyncio.shield(self._spawn(self._in(self._writing, lambda: self._destroy(name))))

    async def add(self, name: str, model: str, items: Sequence[Item]) -> int:
        """Adds items, or replaces those with the same id; they are on the disk when this returns.

        Args:
            name: of a gallery.
            model: label of the model that embedded them.
            items: at least one; of several with one id the last counts.

        Returns:
            The number of items that were replaced.
        """
        gallery = self._find(name)
        try:
            return await self._commit(gallery, Add(model, items))
        except OtherModelError as error:
            raise _other_model(gallery, model) from error
        except OtherDimensionError as error:
            raise refusals.other_dimension(name, error) from error
        except TooManyItemsError as error:
            raise ApiError(413, f"gallery {name!r}: {error}", param="items", code="gallery_full") from error

    async def remove(self, name: str, item: str) -> None:
        """Takes an item out, for good when this returns."""
        if not await self._commit(self._find(name), Remove([item])):
            raise refusals.unknown_item(name, item)

    async def page(self, name: str, after: str, limit: int) -> list[Listed]:
        """Up to limit items whose ids follow `after`, in the order of text."""
        gallery = self._find(name)
        return await self._in(self._searching, lambda: gallery.store.page(after, limit))

    async def image(self, name: str, item: str) -> bytes:
        """The image file of an item, as it was added."""
        gallery = self._find(name)
        found = await self._in(self._searching, lambda: gallery.store.image(item))
        if found is None:
            raise refusals.no_image(name, item)
        return found

    async def search(self, name: str, model: str, query_D: Row, k: int) -> list[Found]:
        """The k nearest items, nearest first.

        Args:
            name: of a gallery.
            model: label of the model that embedded the query.
            query_D: float32 (D,) of unit norm.
            k: neighbours.
        """
        gallery = self._find(name)
        self._build(gallery)  # one that was read at the start has none yet
        try:
            return await self._in(self._searching, lambda: gallery.store.search(query_D, model, k))
        except OtherModelError as error:
            raise _other_model(gallery, model) from error
        except OtherDimensionError as error:
            raise refusals.other_dimension(name, error) from error

    async def claim(self, name: str, model: str) -> bool:
        """Whether a gallery's images are to be embedded by this model, and nobody is at it.

        Then it is the caller who goes through `images`, `stage` and `finish`.
        """
        gallery = self._find(name)
        if not await self.claimable(name, model):
            return False
        before = gallery.staging
        gallery.staging = Staging(model, before.rows if before is not None and before.model == model else {})
        return True

    async def claimable(self, name: str, model: str) -> bool:
        """What `claim` would say."""
        gallery = self._find(name)
        held = gallery.store
        if not len(held) or held.settings.model == model:
            gallery.staging = None
            return False
        if missing := held.without_image:
            says = f"gallery {name!r} was embedded by {held.settings.model}, and {model} is served."
            raise refusals.cannot_reembed(name, says, missing, len(held))
        return gallery.staging is None or not gallery.staging.alive

    async def images(self, name: str, model: str, after: str, limit: int) -> list[tuple[str, str, bytes]]:
        """Id, SHA-256 and file of the items that follow `after` whose images are to be embedded; none at the end."""
        gallery = self._find(name)
        staged = _claimed(gallery, model).rows
        return await self._in(self._searching, lambda: gallery.store.images(after, limit, staged))

    async def stage(self, name: str, model: str, rows: dict[str, Row]) -> None:
        """Holds embeddings (D,) by the SHA-256 of their images until the gallery changes over."""
        _claimed(self._find(name), model).add(rows)

    async def finish(self, name: str, model: str) -> int:
        """Changes the gallery over to the embeddings that were staged, all at once.

        Returns:
            The number of items that still lack one, since they came meanwhile; 0 when it is done.
        """
        gallery = self._find(name)
        staging = _claimed(gallery, model)
        return await asyncio.shield(self._spawn(self._change_over(gallery, staging)))

    async def give_up(self, name: str, model: str, trouble: str | None) -> None:
        """Ends a re-embedding; trouble is why it cannot go on, None where it can later."""
        _claimed(self._find(name), model).end(trouble)

    async def close(self) -> None:
        """Waits for what is being written, closes all files and lets go of the folder."""
        for gallery in self._open.values():
            async with gallery.turn:
                gallery.closed = True
                gallery.store.close()
        for pool in (self._searching, self._writing, self._building):
            pool.shutdown()
        self._lock.release()

    def _find(self, name: str) -> _Open:
        if name in self._damaged:
            raise refusals.damaged(name)
        if name not in self._open:
            raise refusals.unknown_gallery(name, sorted(self._open))
        return self._open[name]

    def _read(self, path: Path) -> None:
        try:
            held = Store(path, exact_up_to=self._exact_up_to)
        except Exception as error:  # one that is broken must not keep the others from being served
            log.error("gallery %s cannot be read: %s: %s", path.name, type(error).__name__, error)
            self._damaged.add(path.name)
            return
        self._open[path.name] = _Open(path.name, held)

    async def _create(self, name: str, settings: Settings) -> None:
        def make() -> Store:
            path = self._folder / name
            if path.exists():
                raise refusals.taken(name)
            new = self._half(name)
            new.mkdir()
            store.make(new, settings)
            new.rename(path)
            sync_folder(self._folder)
            return Store(path, exact_up_to=self._exact_up_to)

        self._open[name] = _Open(name, await self._in(self._writing, make))

    def _half(self, name: str) -> Path:
        return self._folder / f".{name}-{uuid.uuid4().hex}"

    def _destroy(self, name: str) -> None:
        gone = self._half(name)
        (self._folder / name).rename(gone)
        sync_folder(self._folder)
        shutil.rmtree(gone)

    async def _commit(self, gallery: _Open, change: Add | Remove) -> int:
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        gallery.waiting.append((change, done))
        # A task of its own: a client that goes away must not end what is written for others too.
        self._spawn(self._write(gallery))
        return await done

    async def _write(self, gallery: _Open) -> None:
        """Writes what waits, if no one before has written it along."""
        async with gallery.turn:
            together = [(change, done) for change, done in gallery.waiting[:TOGETHER] if not done.done()]
            del gallery.waiting[:TOGETHER]
            if not together:
                return
            outcomes: Sequence[int | Exception]
            if gallery.closed:
                outcomes = [refusals.unknown_gallery(gallery.name, sorted(self._open))] * len(together)
            else:
                changes = [change for change, _ in together]
                outcomes = await self._in(self._writing, lambda: self._stored(gallery, changes))
            for (_, done), outcome in zip(together, outcomes, strict=True):
                if done.done():
                    continue
                if isinstance(outcome, Exception):
                    done.set_exception(outcome)
                else:
                    done.set_result(outcome)
            if not gallery.closed:
                await self._in(self._writing, lambda: self._tidied(gallery))
        self._build(gallery)

    def _stored(self, gallery: _Open, changes: Sequence[Add | Remove]) -> Sequence[int | Exception]:
        try:
            return gallery.store.commit(changes, self._limits.items)
        except OSError as error:
            log.error("gallery %s: %s", gallery.name, error)
            return [refusals.disk_failed()] * len(changes)
        except Exception as error:  # whoever waits must hear of it
            log.exception("gallery %s", gallery.name)
            return [error] * len(changes)

    def _tidied(self, gallery: _Open) -> None:
        try:
            gallery.store.tidy()
        except OSError as error:
            log.error("gallery %s stays as long on the disk as it is: %s", gallery.name, error)

    async def _change_over(self, gallery: _Open, staging: Staging) -> int:
        async with gallery.turn:
            if gallery.closed:
                raise refusals.unknown_gallery(gallery.name, sorted(self._open))
            try:
                missing = await self._in(self._writing, lambda: gallery.store.reembed(staging.model, staging.rows))
            except OSError as error:
                log.error("gallery %s: %s", gallery.name, error)
                raise refusals.disk_failed() from error
            if not missing:
                gallery.staging = None
        self._build(gallery)
        return missing

    def _build(self, gallery: _Open) -> None:
        async def build() -> None:
            try:
                await self._in(self._building, lambda: gallery.store.build_index(self._threads))
            finally:
                gallery.building = False

        if gallery.store.index_stale and not gallery.building:
            gallery.building = True
            self._spawn(build())

    def _spawn(self, work: Coroutine[Any, Any, Result]) -> "asyncio.Task[Result]":
        task = asyncio.create_task(work)
        self._tasks.add(task)  # asyncio itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)
        return task

    async def _in(self, pool: Executor, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(pool, work)


def _claimed(gallery: _Open, model: str) -> Staging:
    if gallery.staging is None or gallery.staging.model != model:
        message = f"gallery {gallery.name!r} is not being embedded by {model}"
        raise ApiError(409, message, param="gallery", code="not_claimed")
    return gallery.staging


def _other_model(gallery: _Open, model: str) -> ApiError:
    staging = gallery.staging
    if staging is not None and staging.model == model and staging.alive:
        return refusals.reembedding(gallery.name, model, len(staging.rows), gallery.store.kept_images)
    trouble = staging.trouble if staging is not None and staging.model == model else None
    return refusals.other_model(gallery.name, gallery.store, model, trouble)

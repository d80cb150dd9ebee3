"""One gallery: its items in memory for searching, and every change of them on the disk before it counts."""

import bisect
import logging
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from serve.gallery.images import Images
from serve.gallery.index import EXACT_UP_TO, Index, IndexReport
from serve.gallery.items import Change, Item, Put, Remove, Settings, decode, encode
from serve.gallery.lock import SharedLock
from serve.gallery.log import Log, create

log = logging.getLogger(__name__)

Value = TypeVar("Value")

FILE = "items.log"
_FRAME = 4096  # items of a frame when the log is written anew
_GARBAGE = 10_000  # replaced and removed items in the log that are left there whatever the gallery's size


class OtherModelError(ValueError):
    """Items of one model for a gallery of another, between which distances mean nothing."""


class OtherDimensionError(ValueError):
    """Embeddings of another D than those that are there, though their models have one label."""


class TooManyItemsError(ValueError):
    """More items than a gallery may have."""


@dataclass(frozen=True)
class Add:
    """Items that a client adds.

    Attributes:
        model: label of the model that embedded them.
        items: at least one; of several with one id the last counts.
    """

    model: str
    items: Sequence[Item]


@dataclass(frozen=True)
class Found:
    """A neighbour of a query: its distance is Euclidean, in [0, 2]."""

    id: str
    distance: float
    metadata: str | None


@dataclass(frozen=True)
class Listed:
    """An item of a listing."""

    id: str
    metadata: str | None
    image: bool
    """Its image is kept."""


class Store:
    """A gallery on the disk.

    One thread writes (`commit`, `tidy`, `reembed`), any number read.

    Args:
        folder: made by `make`.
        exact_up_to: items that are searched one by one.

    Raises:
        DamagedError: the file on the disk is damaged elsewhere than at its end.
    """

    def __init__(self, folder: Path, *, exact_up_to: int = EXACT_UP_TO) -> None:
        self.lock = SharedLock()
        self.settings = Settings(created=0)
        self._folder = folder
        self._exact_up_to = exact_up_to
        self._ids: list[str] = []
        self._slots: dict[str, int] = {}
        self._metadata: list[str | None] = []
        self._digests: list[str | None] = []
        self._sorted: list[str] | None = None
        self._index: Index | None = None
        self._images = Images(folder / "images")
        self._garbage = 0
        self._tried = 0  # garbage when the log was last to be written anew, and could not
        self._log = Log(folder / FILE)
        for payload in self._log.replay():
            for change in decode(payload):
                self._apply(change)
        self._images.drop_unused()
        self._images.drop_unknown()

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def index(self) -> IndexReport:
        """How it is searched."""
        return self._index.report if self._index is not None else IndexReport("flat")

    @property
    def size(self) -> int:
        """Bytes of the log on the disk; images are beside it."""
        return self._log.size

    @property
    def without_image(self) -> int:
        """Items whose image is not kept, so that no other model can embed them."""
        return sum(digest is None for digest in self._digests)

    def commit(self, adds: Sequence[Add | Remove], most: int) -> list[int | Exception]:
        """Makes changes together: with one wait for the disk, and not before it has them.

        Args:
            adds: in the order that they came.
            most: items that the gallery may have.

        Returns:
            For each the number of its ids that were there before, or why it was refused.

        Raises:
            OSError: the disk is full or fails; none of the changes was made.
        """
        try:
            outcomes, changes = self._allowed(adds, most)
            if not changes:
                return outcomes
            self._log.append(encode(changes))
        except Exception:
            if not self._log.broken:  # which may have the items all the same
                self._images.drop_unused()
            raise
        with self.lock.alone():
            there = [self._apply(change) for change in changes]
        self._images.drop_unused()
        return [there[outcome] if isinstance(outcome, int) else outcome for outcome in outcomes]

    def search(self, query_D: npt.NDArray[np.float32], model: str, k: int) -> list[Found]:
        """The k nearest items, nearest first.

        Raises:
            OtherModelError: the query was embedded by another model than the items.
            OtherDimensionError: it has another D than they.
        """
        with self.lock.shared():
            if self._index is None or not len(self):
                return []
            if model != self.settings.model:
                raise OtherModelError(f"its items were embedded by {self.settings.model}, the query by {model}")
            if len(query_D) != self.settings.dim:
                message = f"its embeddings by {model} have {self.settings.dim} numbers, and the query {len(query_D)}"
                raise OtherDimensionError(message)
            distances, slots = self._index.search(query_D, k)
            return [
                Found(self._ids[slot], distance, self._metadata[slot])
                for distance, slot in zip(distances.tolist(), slots.tolist(), strict=True)
            ]

    def page(self, after: str, limit: int) -> list[Listed]:
        """Up to limit items whose ids follow `after`, in the order of text."""
        with self.lock.shared():
            slots = [self._slots[name] for name in self._following(after, limit)]
            return [Listed(self._ids[slot], self._metadata[slot], self._digests[slot] is not None) for slot in slots]

    def images(self, after: str, limit: int, but: Container[str]) -> list[tuple[str, str, bytes]]:
        """Id, SHA-256 and file of kept images of the items that follow `after`.

        Args:
            after: an id.
            limit: items that are looked at together; fewer may come, none only at the end.
            but: SHA-256 of images that are passed over.
        """
        while True:
            with self.lock.shared():
                names = self._following(after, limit)
                digests = [self._digests[self._slots[name]] for name in names]
            found = [
                (name, digest, data)
                for name, digest in zip(names, digests, strict=True)
                if digest is not None and digest not in but and (data := self._images.read(digest)) is not None
            ]
            if found or not names:
                return found
            after = names[-1]

    def image(self, name: str) -> bytes | None:
        """The image file of an item; None where none is kept, or there is no such item."""
        with self.lock.shared():
            slot = self._slots.get(name)
            digest = None if slot is None else self._digests[slot]
        return None if digest is None else self._images.read(digest)

    @property
    def kept_images(self) -> int:
        """Image files that are kept."""
        return len(self._images)

    def reembed(self, model: str, rows: dict[str, npt.NDArray[np.float32]]) -> int:
        """Gives every item the embedding of its image by another model, all at once; then the log is written anew.

        Args:
            model: its label.
            rows: float32 (D,) of unit norm by SHA-256 of the image.

        Returns:
            The number of items whose image is not among them: then nothing was changed.
        """
        missing = sum(digest is None or digest not in rows for digest in self._digests)
        if missing or not rows:
            return missing
        dim = len(next(iter(rows.values())))
        index = Index(dim, self.lock, exact_up_to=self._exact_up_to)
        for start in range(0, len(self), _FRAME):
            slots = range(start, min(start + _FRAME, len(self)))
            index.put(slots, np.stack([rows[str(self._digests[slot])] for slot in slots]))
        settings = replace(self.settings, model=model, dim=dim)
        self._rewrite(settings, index)
        with self.lock.alone():
            self.settings, self._index = settings, index
        return 0

    def tidy(self) -> None:
        """Writes the log anew when most of what it holds was replaced or removed.

        Raises:
            OSError: the disk is full or fails; it is tried again when there is half as much more to win.
        """
        if self._garbage > max(_GARBAGE, len(self), self._tried * 1.5):
            self._tried = self._garbage
            self._rewrite(self.settings, self._index)

    def build_index(self, threads: int) -> None:
        """Makes what a large gallery is searched by, if that has become worth it; searches and writes go on."""
        index = self._index
        if index is not None and index.stale:
            began = time.monotonic()
            index.build(threads)
            log.warning("%s: index of %d items made in %.1f s", self._folder.name, len(self), time.monotonic() - began)

    @property
    def index_stale(self) -> bool:
        """Whether `build_index` has something to do."""
        return self._index is not None and self._index.stale

    def close(self) -> None:
        """Closes its file."""
        self._log.close()

    def _allowed(self, adds: Sequence[Add | Remove], most: int) -> tuple[list[int | Exception], list[Change]]:
        """Of each its place among the changes that are to be made, or why there is none; images are on the disk."""
        outcomes: list[int | Exception] = []
        changes: list[Change] = []
        known = self.settings if len(self) else replace(self.settings, model=None, dim=None)
        coming: set[str] = set()
        for add in adds:
            refusal = self._refusal(add, known, coming, most) if isinstance(add, Add) else None
            if refusal is not None:
                outcomes.append(refusal)
                continue
            if isinstance(add, Add):
                if known.model is None:
                    known = replace(known, model=add.model, dim=len(add.items[0].row))
                    changes.append(known)
                items = list({item.id: item for item in add.items}.values())
                coming |= {item.id for item in items} - self._slots.keys()
                images = self._images.write(item.image if known.keep_images else None for item in items)
                changes.append(Put.of(items, images))
            else:
                changes.append(add)
            outcomes.append(len(changes) - 1)
        return outcomes, changes

    def _refusal(self, add: Add, known: Settings, coming: set[str], most: int) -> Exception | None:
        if known.model not in (None, add.model):
            return OtherModelError(f"its items were embedded by {known.model}, these by {add.model}")
        dim = known.dim or len(add.items[0].row)
        if other := {len(item.row) for item in add.items} - {dim}:
            return OtherDimensionError(f"its embeddings by {add.model} have {dim} numbers, and these {min(other)}")
        total, new = len(self) + len(coming), len({item.id for item in add.items} - self._slots.keys() - coming)
        if total + new > most:
            return TooManyItemsError(f"it has {total:,} items and these are {new:,} more; at most {most:,} are allowed")
        return None

    def _apply(self, change: Change) -> int:
        """The number of ids of the change that were there."""
        match change:
            case Settings():
                if change.dim is not None and (self._index is None or change.dim != self.settings.dim):
                    self._index = Index(change.dim, self.lock, exact_up_to=self._exact_up_to)
                self.settings = change
                return 0
            case Put():
                return self._put(change)
            case Remove():
                return sum(self._remove(name) for name in change.ids)

    def _put(self, change: Put) -> int:
        assert self._index is not None
        before, slots = len(self), []
        images = change.images or [None] * len(change.ids)
        dropped = []
        for name, metadata, digest in zip(change.ids, change.metadata or [None] * len(change.ids), images, strict=True):
            slot = self._slots.get(name)
            if slot is None:
                slot = self._slots[name] = len(self._ids)
                self._ids.append(name)
                self._metadata.append(metadata)
                self._digests.append(digest)
            else:
                dropped.append(self._digests[slot])
                self._metadata[slot], self._digests[slot] = metadata, digest
            slots.append(slot)
        self._index.put(slots, change.rows)
        self._images.count(images, dropped)
        self._garbage += len(dropped)
        if len(self) > before:
            self._sorted = None
        return len(dropped)

    def _remove(self, name: str) -> bool:
        slot = self._slots.pop(name, None)
        if slot is None or self._index is None:
            return False
        self._images.count((), [self._digests[slot]])
        self._index.remove(slot)
        # The last item takes the place, as its row does in the index.
        _replace_by_last(self._ids, slot)
        _replace_by_last(self._metadata, slot)
        _replace_by_last(self._digests, slot)
        if slot < len(self._ids):
            self._slots[self._ids[slot]] = slot
        self._garbage += 1
        self._sorted = None
        return True

    def _rewrite(self, settings: Settings, index: Index | None) -> None:
        self._log.replace(map(encode, self._frames(settings, index)))
        self._garbage = self._tried = 0

    def _frames(self, settings: Settings, index: Index | None) -> Iterator[list[Change]]:
        yield [settings]
        for start in range(0, len(self), _FRAME):
            assert index is not None
            part = slice(start, start + _FRAME)
            metadata, images = self._metadata[part], self._digests[part]
            yield [
                Put(
                    self._ids[part],
                    index.rows[part],
                    metadata if any(text is not None for text in metadata) else (),
                    images if any(digest is not None for digest in images) else (),
                )
            ]

    def _following(self, after: str, limit: int) -> list[str]:
        names = self._sorted
        if names is None:
            names = self._sorted = sorted(self._ids)
        start = bisect.bisect_right(names, after)
        return names[start : start + limit]


def _replace_by_last(column: list[Value], slot: int) -> None:
    last = column.pop()
    if slot < len(column):
        column[slot] = last


def make(folder: Path, settings: Settings) -> None:
    """Makes an empty gallery's file in a folder that is there."""
    create(folder / FILE, [encode([settings])])

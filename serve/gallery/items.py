"""What a gallery holds and how it changes; each change as bytes, so that the disk and the memory see the same."""

import json
import struct
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float32]
NAME = r"[a-z0-9][a-z0-9_-]{0,62}"
"""What a gallery may be called: it is also the name of its folder."""
ID_LENGTH = 512
"""Characters of an item's id at most."""
_NO_TEXT = {"Cc", "Cs", "Zl", "Zp"}  # categories of characters that break lines, or are none
_DEEPEST = 16  # of metadata: answers are written by code that calls itself for each level
_LENGTH = struct.Struct("<I")


def check_id(text: str) -> str:
    """The id, if an item may have it.

    Raises:
        ValueError: it is empty, too long, or has control characters, line separators or halves of characters.
    """
    if not 0 < len(text) <= ID_LENGTH:
        raise ValueError(f"an id has 1 to {ID_LENGTH} characters, got {len(text)}")
    if not text.isprintable() and (wrong := [each for each in text if unicodedata.category(each) in _NO_TEXT]):
        raise ValueError(f"an id has no control characters, line separators or halves of characters, got {wrong[0]!r}")
    return text


def check_metadata(value: dict[str, Any]) -> dict[str, Any]:
    """The metadata, if JSON, and whoever reads it, can say it again.

    Raises:
        ValueError: it is nested too deep, or has what JSON cannot say.
    """
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    if level:
        raise ValueError(f"metadata is nested deeper than {_DEEPEST - 1} levels")
    try:
        text_of(value).encode()
    except TypeError as error:
        raise ValueError(f"metadata cannot be said in JSON: {error}") from error
    except ValueError:
        raise ValueError("metadata has a number that JSON cannot say, or half a character") from None
    return value


def text_of(metadata: dict[str, Any]) -> str:
    """Metadata as it is kept.

    Raises:
        ValueError, TypeError: JSON cannot say it.
    """
    return json.dumps(metadata, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


@dataclass(frozen=True)
class Settings:
    """What is known of a gallery beside its items."""

    created: int
    """Seconds since 1970."""
    keep_images: bool = False
    """Images that were added are kept, so that another model can embed them."""
    model: str | None = None
    """Label of the model that embedded the items: onethreshold@3; None as long as there are none."""
    dim: int | None = None
    """D of that model."""


_SETTINGS = {field.name for field in fields(Settings)}


@dataclass(frozen=True)
class Item:
    """One item as it is added.

    Attributes:
        id: 1 to 512 characters, its own in the gallery.
        row: float32 (D,) of unit norm.
        metadata: a JSON object, as text; None for none.
        image: the image file that was embedded; None for an item that was given as an embedding.
    """

    id: str
    row: Rows
    metadata: str | None = None
    image: bytes | None = None


@dataclass(frozen=True)
class Put:
    """Items that are added, or replaced where their id is there.

    Attributes:
        ids: no two alike.
        rows: float32 (B, D) of unit norm.
        metadata: JSON objects as text, by item; empty when none has any.
        images: SHA-256 of the kept image files, by item; empty when none is kept.
    """

    ids: Sequence[str]
    rows: Rows
    metadata: Sequence[str | None] = ()
    images: Sequence[str | None] = ()

    @classmethod
    def of(cls, items: Sequence[Item], images: Sequence[str | None] = ()) -> "Put":
        """Items that were checked."""
        metadata = [item.metadata for item in items]
        return cls(
            [item.id for item in items],
            np.stack([item.row for item in items]),
            metadata if any(text is not None for text in metadata) else (),
            images if any(digest is not None for digest in images) else (),
        )


@dataclass(frozen=True)
class Remove:
    """Items that are taken out; ids that are not there are passed over."""

    ids: Sequence[str]


Change = Settings | Put | Remove


def encode(changes: Sequence[Change]) -> bytes:
    """Changes in their order as bytes: JSON, and the rows behind it."""
    described: list[Any] = []
    rows: list[bytes] = []
    for change in changes:
        match change:
            case Settings():
                described.append(["settings", asdict(change)])
            case Put():
                described.append(["put", list(change.ids), list(change.metadata), list(change.images)])
                rows.append(np.ascontiguousarray(change.rows, dtype="<f4").tobytes())
            case Remove():
                described.append(["remove", list(change.ids)])
    head = json.dumps(described, separators=(",", ":")).encode()
    return b"".join([_LENGTH.pack(len(head)), head, *rows])


def decode(payload: memoryview) -> Iterator[Change]:
    """The changes of `encode`, with arrays of their own.

    Raises:
        ValueError: a change of a kind that is not known here.
    """
    (length,) = _LENGTH.unpack_from(payload)
    described = json.loads(bytes(payload[_LENGTH.size : _LENGTH.size + length]))
    floats = np.frombuffer(bytes(payload[_LENGTH.size + length :]), "<f4").astype(np.float32, copy=False)
    counts = [len(change[1]) if change[0] == "put" else 0 for change in described]
    dim = len(floats) // max(1, sum(counts))
    ends = dim * np.cumsum([0, *counts])
    for (kind, *values), (start, end) in zip(described, pairwise(ends), strict=True):
        if kind == "settings":
            # A later version may have written more of them: after a roll-back its galleries are still served.
            yield Settings(**{name: value for name, value in values[0].items() if name in _SETTINGS})
        elif kind == "remove":
            yield Remove(values[0])
        elif kind == "put":
            ids, metadata, images = values
            yield Put(ids, floats[start:end].reshape(len(ids), dim), metadata, images)
        else:
            raise ValueError(f"a change of the unknown kind {kind!r}; known: settings, put, remove")

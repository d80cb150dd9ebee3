"""Galleries from a command line: those of a running service, over HTTP, or those of a folder that none is using."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import quote

import httpx
import numpy as np
import numpy.typing as npt

from cluster import registry
from dml.data.images import ImageError
from serve.gallery.galleries import Galleries
from serve.gallery.items import Item, text_of
from serve.gallery.reembed import reembed
from serve.model import CheckpointEmbedder, Embedder, label
from serve.schemas import ApiError

Result = TypeVar("Result")
Row = npt.NDArray[np.float32]

TRIES = 8
"""Times that a busy service is asked."""
LOOK = 0.5
"""Seconds between two looks at a re-embedding."""


class ReachError(ValueError):
    """A service that cannot be reached, or that refused; the message is the service's own."""


class Reach(Protocol):
    """What the command line asks of galleries."""

    def serves(self, model: str | None, dim: int | None = None) -> str:
        """The label of the model whose embeddings can be added, given the one that made them and D where known."""

    def infos(self) -> list[dict[str, Any]]:
        """What is known of each gallery."""

    def create(self, name: str, keep_images: bool | None) -> bool:
        """Makes a gallery; False when it is there."""

    def delete(self, name: str) -> None:
        """Deletes a gallery."""

    def add(self, name: str, model: str, ids: Sequence[str], rows_BD: Row, metadata: Sequence[dict[str, Any]]) -> None:
        """Adds embeddings (B, D) that the model made: finite, and none of the norm 0; every id once."""

    def rebuild(self, name: str, shown: Callable[[int, int], None]) -> bool:
        """Has the kept images embedded by the present model, and tells how far it is; False if they are already."""


class Service:
    """The galleries of a running service.

    Args:
        url: of the service.
        key: API key; empty for none.

    Every method raises ReachError.
    """

    def __init__(self, url: str, key: str = "") -> None:
        self._url = url
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=120)

    def serves(self, model: str | None, dim: int | None = None) -> str:
        """The label of the model that is served; refuses another, and another D than its own."""
        cards = self._ask("GET", "/v1/models")["data"]
        if not cards:
            raise ReachError(f"{self._url} has no model yet; python -m tune.search trains and registers one")
        served = f"{cards[0]['id']}@{cards[0]['version']}"
        if model not in (None, served):
            raise ReachError(
                f"these are embeddings of {model}, and {self._url} serves {served}: distances between them mean "
                f"nothing; embed the images with python -m cluster.embed --model {_uri(cards[0])}"
            )
        if dim not in (None, cards[0]["dim"]):
            raise ReachError(f"these embeddings have {dim} numbers, and those of {served} {cards[0]['dim']}")
        return served

    def infos(self) -> list[dict[str, Any]]:
        """What is known of each gallery."""
        found: list[dict[str, Any]] = self._ask("GET", "/v1/galleries")["data"]
        return found

    def create(self, name: str, keep_images: bool | None) -> bool:
        """Makes a gallery; False when it is there."""
        there = any(each["name"] == name for each in self.infos())
        self._ask("PUT", _path(name), {"keep_images": keep_images})
        return not there

    def delete(self, name: str) -> None:
        """Deletes a gallery."""
        self._ask("DELETE", _path(name))

    def add(self, name: str, model: str, ids: Sequence[str], rows_BD: Row, metadata: Sequence[dict[str, Any]]) -> None:
        """Adds embeddings; the service refuses them when it serves another model by now."""
        items = [
            {"id": each, "input": row, "metadata": more or None}
            for each, row, more in zip(ids, rows_BD.tolist(), metadata, strict=True)
        ]
        self._ask("POST", f"{_path(name)}/items", {"items": items, "model": model})

    def rebuild(self, name: str, shown: Callable[[int, int], None]) -> bool:
        """Asks for it, and follows it until it is done."""
        info = self._ask("POST", f"{_path(name)}/rebuild")
        wanted, before = self.serves(None), info["model"]
        if info["model"] == wanted or not info["items"]:
            return False
        while info["model"] == before:
            time.sleep(LOOK)
            info = self._ask("GET", _path(name))
            how = info["reembedding"]
            if how is None and info["model"] == before:
                self._ask("POST", f"{_path(name)}/rebuild")  # whoever was at it has ended
            elif how is not None and how["trouble"]:
                raise ReachError(f"gallery {name!r} stays embedded by {before}: {how['trouble']}")
            elif how is not None:
                shown(how["done"], how["of"])
        return True

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        for left in reversed(range(TRIES)):
            try:
                answer = self._http.request(method, path, json=body)
            except httpx.TransportError as error:
                message = f"{self._url} cannot be reached ({error}); python -m serve.app starts a service"
                raise ReachError(message) from error
            if answer.status_code not in (429, 503) or not left:
                break
            wait = answer.headers.get("Retry-After", "")
            time.sleep(min(10, int(wait) if wait.isdecimal() else 1))
        if answer.is_success:
            return answer.json()
        try:
            message = str(answer.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = f"{self._url}{path} answered {answer.status_code}"
        raise ReachError(message)


class Offline:
    """The galleries of a folder, without a service.

    Args:
        folder: that no service is using.
        model: checkpoint folder or models: URI, by which images are embedded anew; empty where none are.

    Raises:
        WrittenElsewhereError: a process is using the folder.
    """

    def __init__(self, folder: Path, model: str = "") -> None:
        self._model = model
        self._runner = asyncio.Runner()
        self._galleries = Galleries(folder)

    def serves(self, model: str | None, dim: int | None = None) -> str:
        """The model that made the embeddings; without a service any is right that is known."""
        if model is None:
            raise ReachError("the file does not say which model made its embeddings: give --made-by onethreshold@3")
        return model

    def infos(self) -> list[dict[str, Any]]:
        """What is known of each gallery."""
        return [asdict(self._run(self._galleries.info(name))) for name in self._run(self._galleries.names())]

    def create(self, name: str, keep_images: bool | None) -> bool:
        """Makes a gallery; False when it is there."""
        return self._run(self._galleries.create(name, keep_images))

    def delete(self, name: str) -> None:
        """Deletes a gallery."""
        self._run(self._galleries.delete(name))

    def add(self, name: str, model: str, ids: Sequence[str], rows_BD: Row, metadata: Sequence[dict[str, Any]]) -> None:
        """Adds embeddings."""
        unit_BD = rows_BD / np.linalg.norm(rows_BD.astype(np.float64), axis=1, keepdims=True)
        items = [
            Item(each, row, text_of(more) if more else None)
            for each, row, more in zip(ids, unit_BD.astype(np.float32), metadata, strict=True)
        ]
        self._run(self._galleries.add(name, model, items))

    def rebuild(self, name: str, shown: Callable[[int, int], None]) -> bool:
        """Embeds the images in this process."""
        if not self._model:
            raise ReachError("give --model: the checkpoint folder or models:/NAME@ALIAS that is to embed the images")
        model = _embedder(self._model)
        if not self._run(self._galleries.claim(name, label(model))):
            return False
        done = 0

        async def embed(items: Sequence[tuple[str, bytes]]) -> Row:
            nonlocal done
            rows = model.embed([_decoded(model, item, data) for item, data in items])
            done += len(items)
            shown(done, (await self._galleries.info(name)).images)
            return rows

        self._run(reembed(self._galleries, name, label(model), embed, lambda: True))
        return True

    def close(self) -> None:
        """Lets go of the folder."""
        self._runner.run(self._galleries.close())
        self._runner.close()

    def _run(self, asked: Awaitable[Result]) -> Result:
        async def answered() -> Result:
            return await asked

        try:
            return self._runner.run(answered())
        except ApiError as error:
            raise ReachError(error.message) from error


def _embedder(wanted: str) -> Embedder:
    folder, name = registry.fetch(wanted)
    if not wanted.startswith("models:"):
        return CheckpointEmbedder(folder, registry.NAME, name)
    registered, _, version = name.partition("@")
    return CheckpointEmbedder(folder, registered, version)


def _decoded(model: Embedder, item: str, data: bytes) -> Any:
    try:
        return model.decode(data)
    except ImageError as error:
        raise ApiError(422, f"{item} is unreadable: {error}") from error


def _path(name: str) -> str:
    return f"/v1/galleries/{quote(name, safe='')}"


def _uri(card: dict[str, Any]) -> str:
    return f"models:/{card['id']}/{card['version']}"

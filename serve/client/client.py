"""The client, for programs that wait and for programs that await; the two differ in nothing else."""

import asyncio
import os
import time
from collections.abc import Iterable
from typing import Any, Self, TypeVar

import httpx
import numpy as np
import numpy.typing as npt

from serve.client import answers, calls
from serve.client.calls import Call, Item, Outcome, Picture, Row, Send, Wait
from serve.client.errors import ServiceError
from serve.client.retries import Retries

Result = TypeVar("Result")
URL = "http://127.0.0.1:8000"
KEY = "ONETHRESHOLD_KEY"
"""The environment variable with the API key."""


class Client:
    """A client of the service.

    Every method raises ServiceError (a subclass says which) when the service refuses, fails or cannot be reached before
    the deadline of `retries`, and OSError when an image file cannot be read.

    Args:
        url: of the service.
        key: the API key; unset, that of the environment variable ONETHRESHOLD_KEY, if there is one.
        retries: when to try again.

    Raises:
        ServiceError: the url is no address.
    """

    def __init__(self, url: str = URL, *, key: str | None = None, retries: Retries | None = None) -> None:
        self._http = httpx.Client(base_url=_address(url), headers=_headers(key))
        self._retries = retries or Retries()

    def embeddings(self, images: Iterable[Picture], *, model: str | None = None) -> npt.NDArray[np.float32]:
        """Embeddings (B, D) of unit norm, in the order of the images; of a long list, in several requests.

        All are by one model; when another takes its place between two requests, NotFoundError says so.
        """
        return _stacked([self._do(call) for call in calls.embeddings(images, model)])

    def verify(
        self,
        a: Item,
        b: Item,
        *,
        far: float | None = None,
        threshold: float | None = None,
        model: str | None = None,
    ) -> answers.Verification:
        """Whether two items match, at a false accept rate or a distance; with neither, as the service chooses."""
        return self._do(calls.verify(a, b, far, threshold, model))

    def search(
        self,
        gallery: str,
        query: Item,
        k: int = 10,
        *,
        far: float | None = None,
        threshold: float | None = None,
        model: str | None = None,
    ) -> answers.SearchResult:
        """The k nearest items of a gallery, nearest first."""
        return self._do(calls.search(gallery, query, k, far, threshold, model))

    def galleries(self) -> list[answers.Gallery]:
        """All galleries."""
        return self._do(calls.galleries())

    def gallery(self, name: str) -> answers.Gallery:
        """One gallery."""
        return self._do(calls.gallery(name))

    def create_gallery(self, name: str, *, keep_images: bool = False) -> answers.Gallery:
        """Makes a gallery, if there is none of that name."""
        return self._do(calls.create_gallery(name, keep_images))

    def delete_gallery(self, name: str) -> None:
        """Deletes a gallery with all its items."""
        self._do(calls.delete_gallery(name))

    def add(self, gallery: str, rows: Iterable[Row]) -> int:
        """Adds items (id, item) or (id, item, metadata), each in place of one with its id; says how many."""
        return sum(self._do(call) for call in calls.add(gallery, rows))

    def items(self, gallery: str, *, after: str | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """Items of a gallery by id, without their embeddings, from the one after `after` on."""
        return self._do(calls.items(gallery, after, limit))

    def delete_item(self, gallery: str, id_: str) -> None:
        """Deletes an item of a gallery."""
        self._do(calls.delete_item(gallery, id_))

    def models(self) -> list[answers.Model]:
        """What is served."""
        return self._do(calls.models())

    def ready(self) -> answers.Ready:
        """Waits until a model is loaded, at most until the deadline."""
        return self._do(calls.ready())

    def close(self) -> None:
        """Closes its connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _do(self, call: Call[Result]) -> Result:
        steps = calls.steps(call, self._retries)
        came: Outcome = None
        while True:
            try:
                step = steps.send(came)
            except StopIteration as done:
                result: Result = done.value
                return result
            came = self._perform(call, step)

    def _perform(self, call: Call[Result], step: Send | Wait) -> Outcome:
        if isinstance(step, Wait):
            time.sleep(step.seconds)
            return None
        try:
            return self._http.send(call.request(self._http, step.seconds))
        except httpx.RequestError as failed:
            return failed


class AsyncClient:
    """`Client` with methods to await; see there.

    Args:
        url: of the service.
        key: the API key; unset, that of the environment variable ONETHRESHOLD_KEY, if there is one.
        retries: when to try again.

    Raises:
        ServiceError: the url is no address.
    """

    def __init__(self, url: str = URL, *, key: str | None = None, retries: Retries | None = None) -> None:
        self._http = httpx.AsyncClient(base_url=_address(url), headers=_headers(key))
        self._retries = retries or Retries()

    async def embeddings(self, images: Iterable[Picture], *, model: str | None = None) -> npt.NDArray[np.float32]:
        """Embeddings (B, D) of unit norm, in the order of the images; of a long list, in several requests.

        All are by one model; when another takes its place between two requests, NotFoundError says so.
        """
        return _stacked([await self._do(call) for call in calls.embeddings(images, model)])

    async def verify(
        self,
        a: Item,
        b: Item,
        *,
        far: float | None = None,
        threshold: float | None = None,
        model: str | None = None,
    ) -> answers.Verification:
        """Whether two items match, at a false accept rate or a distance; with neither, as the service chooses."""
        return await self._do(calls.verify(a, b, far, threshold, model))

    async def search(
        self,
        gallery: str,
        query: Item,
        k: int = 10,
        *,
        far: float | None = None,
        threshold: float | None = None,
        model: str | None = None,
    ) -> answers.SearchResult:
        """The k nearest items of a gallery, nearest first."""
        return await self._do(calls.search(gallery, query, k, far, threshold, model))

    async def galleries(self) -> list[answers.Gallery]:
        """All galleries."""
        return await self._do(calls.galleries())

    async def gallery(self, name: str) -> answers.Gallery:
        """One gallery."""
        return await self._do(calls.gallery(name))

    async def create_gallery(self, name: str, *, keep_images: bool = False) -> answers.Gallery:
        """Makes a gallery, if there is none of that name."""
        return await self._do(calls.create_gallery(name, keep_images))

    async def delete_gallery(self, name: str) -> None:
        """Deletes a gallery with all its items."""
        await self._do(calls.delete_gallery(name))

    async def add(self, gallery: str, rows: Iterable[Row]) -> int:
        """Adds items (id, item) or (id, item, metadata), each in place of one with its id; says how many."""
        return sum([await self._do(call) for call in calls.add(gallery, rows)])

    async def items(self, gallery: str, *, after: str | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        """Items of a gallery by id, without their embeddings, from the one after `after` on."""
        return await self._do(calls.items(gallery, after, limit))

    async def delete_item(self, gallery: str, id_: str) -> None:
        """Deletes an item of a gallery."""
        await self._do(calls.delete_item(gallery, id_))

    async def models(self) -> list[answers.Model]:
        """What is served."""
        return await self._do(calls.models())

    async def ready(self) -> answers.Ready:
        """Waits until a model is loaded, at most until the deadline."""
        return await self._do(calls.ready())

    async def close(self) -> None:
        """Closes its connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _do(self, call: Call[Result]) -> Result:
        steps = calls.steps(call, self._retries)
        came: Outcome = None
        while True:
            try:
                step = steps.send(came)
            except StopIteration as done:
                result: Result = done.value
                return result
            came = await self._perform(call, step)

    async def _perform(self, call: Call[Result], step: Send | Wait) -> Outcome:
        if isinstance(step, Wait):
            await asyncio.sleep(step.seconds)
            return None
        try:
            return await self._http.send(call.request(self._http, step.seconds))
        except httpx.RequestError as failed:
            return failed


def _address(url: str) -> httpx.URL:
    try:
        return httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ServiceError(f"url: {url!r} is no address ({error}); valid: http://HOST:PORT") from None


def _headers(key: str | None) -> dict[str, str]:
    key = key if key is not None else os.environ.get(KEY, "")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _stacked(batches: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
    return np.concatenate(batches) if batches else np.empty((0, 0), dtype=np.float32)

"""Each call as a value: what is sent and how its answer is read; and what happens between the two, without any I/O."""

import base64
import io
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar
from urllib.parse import quote

import httpx
import numpy as np
import numpy.typing as npt

from serve.client import answers
from serve.client.errors import ServiceError, UnavailableError, error_of
from serve.client.retries import Retries, Tries

if TYPE_CHECKING:
    from PIL import Image

Result = TypeVar("Result")
Picture: TypeAlias = "str | Path | bytes | Image.Image"
"""A path, a data URI (data:image/png;base64,...), the bytes of an image file, or a Pillow image."""
Item: TypeAlias = "Picture | Sequence[float] | npt.NDArray[np.floating[Any]]"
"""A picture, or an embedding (D,)."""
Row: TypeAlias = tuple[str, Item] | tuple[str, Item, Mapping[str, Any]]
"""An item of a gallery: its id, itself, and its metadata."""

ITEMS, CHARACTERS = 32, 12 * 2**20
"""The most that one request carries of a longer list: well within what a service accepts unless told otherwise."""
CONNECT_S = 5.0
_NPY = "application/x-npy"
_MODEL = "x-onethreshold-model"
_PASSING = (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError)


@dataclass(frozen=True)
class Call(Generic[Result]):
    """One call of the service.

    Attributes:
        method: of HTTP.
        path: beneath the service's address.
        read: what its answer means.
        error: what an answer other than 2xx means.
        body: sent as JSON; None sends none.
        params: of the query; those that are None are left out.
        headers: beside those that every call has.
    """

    method: str
    path: str
    read: Callable[[httpx.Response], Result]
    body: Mapping[str, Any] | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    error: Callable[[httpx.Response], ServiceError] = error_of

    def request(self, http: httpx.Client | httpx.AsyncClient, seconds: float) -> httpx.Request:
        """One try of it, which may take this long."""
        params = {name: value for name, value in self.params.items() if value is not None}
        return http.build_request(
            self.method,
            self.path,
            json=self.body,
            params=params,
            headers=self.headers,
            timeout=httpx.Timeout(seconds, connect=min(seconds, CONNECT_S)),
        )


Outcome: TypeAlias = httpx.Response | httpx.RequestError | None


@dataclass(frozen=True)
class Send:
    """A step of a call: one try, which may take so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Wait:
    """A step of a call: nothing, for so many seconds."""

    seconds: float


def steps(call: Call[Result], retries: Retries) -> Generator[Send | Wait, Outcome, Result]:
    """What a client has to do for a call, step by step; it sends back what came of each `Send`, and None of a `Wait`.

    Raises:
        ServiceError: the service refused or failed, or could not be reached in time.
    """
    tries = Tries(retries)
    lost = False
    while True:
        came = yield Send(tries.left)
        answer = came if isinstance(came, httpx.Response) else None
        # What is no longer there may have been deleted by a try whose answer was lost.
        deleted = lost and call.method == "DELETE" and answer is not None and answer.status_code == 404
        if answer is not None and (answer.is_success or deleted):
            return _read(call, answer)
        lost = lost or answer is None
        seconds = tries.wait(answer) if answer is not None or isinstance(came, _PASSING) else None
        if seconds is None:
            if answer is not None:
                raise call.error(answer)
            raise UnavailableError(f"the service gave no answer: {type(came).__name__}: {came}")
        yield Wait(seconds)


def _read(call: Call[Result], answer: httpx.Response) -> Result:
    try:
        return call.read(answer)
    except (KeyError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
        message = f"{call.method} {call.path} was answered in a form that this client does not know ({said})"
        raise ServiceError(message, status=answer.status_code) from error


def embeddings(images: Iterable[Picture], model: str | None) -> Iterator[Call[npt.NDArray[np.float32]]]:
    """POST /v1/embeddings, as often as so many images need; each is to be done before the next is asked for.

    What answers the first answers all, or none: embeddings of two models cannot be compared.
    """
    before = 0

    def read(answer: httpx.Response) -> npt.NDArray[np.float32]:
        nonlocal model
        model = answer.headers.get(_MODEL, model)
        return _rows(answer)

    for batch in _batches((text, len(text)) for text in map(encoded, images)):
        body = _without_none({"input": batch, "model": model, "encoding_format": "base64"})
        headers = {"Accept": f"{_NPY}, application/json;q=0.5"}
        yield Call("POST", "/v1/embeddings", read, body, headers=headers, error=partial(_error_after, before, model))
        before += len(batch)


def verify(
    a: Item, b: Item, far: float | None, threshold: float | None, model: str | None
) -> Call[answers.Verification]:
    """POST /v1/verify."""
    body = {"a": encoded(a), "b": encoded(b), "far": far, "threshold": threshold, "model": model}
    return Call("POST", "/v1/verify", lambda answer: answers.verification(answer.json()), _without_none(body))


def search(
    gallery: str, query: Item, k: int, far: float | None, threshold: float | None, model: str | None
) -> Call[answers.SearchResult]:
    """POST /v1/search."""
    body = {"gallery": gallery, "query": encoded(query), "k": k, "far": far, "threshold": threshold, "model": model}
    return Call("POST", "/v1/search", lambda answer: answers.search_result(answer.json()), _without_none(body))


def galleries() -> Call[list[answers.Gallery]]:
    """GET /v1/galleries."""
    return Call("GET", "/v1/galleries", lambda answer: [answers.gallery(row) for row in answer.json()["data"]])


def gallery(name: str) -> Call[answers.Gallery]:
    """GET /v1/galleries/NAME."""
    return Call("GET", _gallery(name), lambda answer: answers.gallery(answer.json()))


def create_gallery(name: str, keep_images: bool) -> Call[answers.Gallery]:
    """PUT /v1/galleries/NAME."""
    body = {"keep_images": keep_images}
    return Call("PUT", _gallery(name), lambda answer: answers.gallery(answer.json()), body)


def delete_gallery(name: str) -> Call[None]:
    """DELETE /v1/galleries/NAME."""
    return Call("DELETE", _gallery(name), lambda _: None)


def add(gallery: str, rows: Iterable[Row]) -> Iterator[Call[int]]:
    """POST /v1/galleries/NAME/items, as often as so many items need; each gives how many it sent."""

    def sized() -> Iterator[tuple[dict[str, Any], int]]:
        for id_, item, *metadata in rows:
            row: dict[str, Any] = {"id": id_, "input": encoded(item)}
            if metadata:
                row["metadata"] = metadata[0]
            yield row, len(json.dumps(row))

    before = 0
    for batch in _batches(sized()):
        sent, error = partial(_sent, len(batch)), partial(_error_after, before, None)
        yield Call("POST", f"{_gallery(gallery)}/items", sent, {"items": batch}, error=error)
        before += len(batch)


def items(gallery: str, after: str | None, limit: int | None) -> Call[list[dict[str, Any]]]:
    """GET /v1/galleries/NAME/items."""
    params = {"after": after, "limit": limit}
    return Call("GET", f"{_gallery(gallery)}/items", lambda answer: list(answer.json()["data"]), params=params)


def delete_item(gallery: str, id_: str) -> Call[None]:
    """DELETE /v1/galleries/NAME/items/ID."""
    return Call("DELETE", f"{_gallery(gallery)}/items/{quote(id_, safe='')}", lambda _: None)


def models() -> Call[list[answers.Model]]:
    """GET /v1/models."""
    return Call("GET", "/v1/models", lambda answer: [answers.model(row) for row in answer.json()["data"]])


def ready() -> Call[answers.Ready]:
    """GET /readyz."""
    return Call("GET", "/readyz", lambda answer: answers.ready(answer.json()))


def encoded(item: Item) -> str | list[float]:
    """An item as JSON has it: base64 of an image file, or the numbers of an embedding.

    Raises:
        OSError: the file cannot be read.
        TypeError: it is neither.
    """
    if isinstance(item, str) and item.startswith("data:"):
        return item
    if isinstance(item, str | Path):
        return base64.b64encode(Path(item).read_bytes()).decode()
    if isinstance(item, bytes):
        return base64.b64encode(item).decode()
    if hasattr(item, "save"):
        stream = io.BytesIO()
        item.save(stream, "PNG")
        return base64.b64encode(stream.getvalue()).decode()
    try:
        row_D = np.asarray(item, dtype=np.float64)
    except (TypeError, ValueError):
        row_D = np.empty(())
    if row_D.ndim != 1:
        kind = f"shape {np.shape(item)}" if isinstance(item, np.ndarray) else type(item).__name__
        raise TypeError(
            f"an item is a path, a data URI, bytes, a Pillow image or an embedding (D,), but this has {kind}"
        )
    return [float(number) for number in row_D]


def _batches(sized: Iterable[tuple[Any, int]]) -> Iterator[list[Any]]:
    batch: list[Any] = []
    size = 0
    for each, length in sized:
        if batch and (len(batch) == ITEMS or size + length > CHARACTERS):
            yield batch
            batch, size = [], 0
        batch.append(each)
        size += length
    if batch:
        yield batch


def _error_after(before: int, model: str | None, answer: httpx.Response) -> ServiceError:
    """The error of a request for a part of a list, in the words of the whole: after so many of it, by this model."""
    found = error_of(answer)
    message, param = (_shifted(text, before) for text in (found.message, found.param or ""))
    if before and found.code == "model_not_found":
        message = f"{model} is no longer served after {before} of the images, and another model's do not go with those"
    return type(found)(message, status=found.status, code=found.code, param=param or None)


def _shifted(text: str, before: int) -> str:
    """With input[2] or items[2] at its beginning counted from further back."""
    return re.sub(r"^(input|items)\[(\d+)\]", lambda found: f"{found[1]}[{int(found[2]) + before}]", text)


def _rows(answer: httpx.Response) -> npt.NDArray[np.float32]:
    if answer.headers.get("content-type", "").startswith(_NPY):
        return np.asarray(np.load(io.BytesIO(answer.content), allow_pickle=False), dtype=np.float32)
    packed = [base64.b64decode(row["embedding"]) for row in answer.json()["data"]]
    return np.stack([np.frombuffer(row, dtype="<f4") for row in packed]).astype(np.float32)


def _sent(count: int, _: httpx.Response) -> int:
    return count


def _gallery(name: str) -> str:
    return f"/v1/galleries/{quote(name, safe='')}"


def _without_none(body: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}

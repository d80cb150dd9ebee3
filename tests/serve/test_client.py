"""The client against real servers: the service itself, and one that fails as services under load do."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI, Request, Response
from PIL import Image

from serve import api
from serve.client import (
    AsyncClient,
    AuthenticationError,
    Client,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    RateLimitError,
    Retries,
    ServiceError,
    UnavailableError,
    calls,
)
from serve.client.__main__ import main
from serve.client.retries import Tries, retry_after
from serve.gallery.galleries import Galleries
from serve.gallery.limits import GalleryLimits
from serve.limits import Limits
from tests.serve.calibrated import calibration, colour
from tests.serve.pictures import Held, data_uri, png
from tests.serve.server import running

RED, PINK, BLUE = png((255, 0, 0)), png((255, 64, 0)), png((0, 0, 255))
QUICK = Retries(deadline=10, first=0.01, longest=0.02)
CALIBRATION = calibration()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    galleries = Galleries(tmp_path_factory.mktemp("galleries"), GalleryLimits())
    with running(api.build(Held(colour(CALIBRATION)), Limits(images=40), galleries=galleries)) as url:
        yield url


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {"red": RED, "pink": PINK, "blue": BLUE}
    for name, data in found.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    return {name: tmp_path / f"{name}.png" for name in found}


def test_every_kind_of_picture_is_embedded(url: str, files: dict[str, Path]) -> None:
    pictures = [str(files["red"]), files["blue"], RED, data_uri(BLUE), Image.new("RGB", (9, 9), (255, 0, 0))]
    with Client(url) as client:
        found = client.embeddings(pictures)
        assert client.embeddings([]).shape == (0, 0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[1, 0, 0], [0, 0, 1], [1, 0, 0], [0, 0, 1], [1, 0, 0]], atol=1e-6)


def test_a_long_list_goes_in_several_requests_and_keeps_its_order(url: str) -> None:
    shades = [png((value, 0, 255 - value)) for value in range(0, 250, 3)]
    assert len(shades) > 2 * calls.ITEMS
    with Client(url) as client:
        together = client.embeddings(shades)
        np.testing.assert_allclose(together[::20], [client.embeddings([one])[0] for one in shades[::20]], atol=1e-6)
    assert [len(call.body["input"]) for call in calls.embeddings(shades, None) if call.body] == [32, 32, 20]
    large = [bytes(calls.CHARACTERS // 2)] * 3
    assert [len(call.body["input"]) for call in calls.embeddings(large, None) if call.body] == [1, 1, 1]


def test_a_long_list_is_embedded_by_one_model_or_not_at_all() -> None:
    """The model is changed over between two of its requests."""
    held = Held(None)

    def pictures() -> Iterator[bytes]:
        held.current = colour(CALIBRATION)
        for number in range(2 * calls.ITEMS):
            if number == calls.ITEMS + 1:  # the first request is over by now
                held.current = colour(CALIBRATION)
                held.current.version = "8"
            yield RED

    async def ask(url: str) -> Any:
        async with AsyncClient(url) as client:
            return await client.embeddings(pictures(), model="colour")

    says = "colour@7 is no longer served after 32 of the images"
    with running(api.build(held)) as url:
        with Client(url) as client, pytest.raises(NotFoundError, match=says):
            client.embeddings(pictures())
        with pytest.raises(NotFoundError, match=says):
            asyncio.run(ask(url))


def test_an_error_names_the_image_by_its_place_in_the_whole_list(url: str) -> None:
    with Client(url) as client:
        with pytest.raises(InvalidRequestError, match=r"^input\[34\] is unreadable") as refused:
            client.embeddings([*[RED] * 34, b"text"])
        assert refused.value.param == "input[34]"
        client.create_gallery("long")
        row = [1.0, 0.0, 0.0]
        with pytest.raises(InvalidRequestError, match=r"^items\[33\]\.input has 2 numbers") as refused:
            client.add("long", [*((str(number), row) for number in range(33)), ("33", row[:2])])
        assert refused.value.param == "items[33].input"
        client.delete_gallery("long")


def test_a_pair_is_verified_by_images_or_embeddings(url: str, files: dict[str, Path]) -> None:
    with Client(url) as client:
        found = client.verify(files["red"], PINK, far=0.01)
        again = client.verify(client.embeddings([RED])[0], client.embeddings([PINK])[0].tolist(), far=0.01)
        assert again.distance == pytest.approx(found.distance, abs=1e-6)
        assert client.verify(RED, BLUE, threshold=1.5).operating_point is None
    point = CALIBRATION.at(0.01)
    assert (found.match, found.threshold, found.model, found.calibration) == (
        True,
        point.threshold,
        "colour@7",
        CALIBRATION.id,
    )
    assert found.operating_point is not None
    assert found.operating_point.far_interval == (0.005, 0.02)


def test_the_asynchronous_client_gives_the_same_answers(url: str) -> None:
    async def ask() -> list[Any]:
        async with AsyncClient(url) as client:
            pair = await asyncio.gather(client.verify(RED, PINK), client.verify(RED, BLUE))
            rows = await client.embeddings([RED, BLUE])
            return [*pair, rows.tolist(), await client.models(), await client.ready()]

    with Client(url) as client:
        expected = [client.verify(RED, PINK), client.verify(RED, BLUE), client.embeddings([RED, BLUE]).tolist()]
        assert asyncio.run(ask()) == [*expected, client.models(), client.ready()]
        [model] = client.models()
        assert (model.id, model.version, model.dim, client.ready().model) == ("colour", "7", 3, "colour@7")


def test_both_clients_offer_the_same_calls() -> None:
    public = [{name for name in vars(kind) if not name.startswith("_")} for kind in (Client, AsyncClient)]
    assert public[0] == public[1]


def test_what_the_service_refuses_is_raised_with_its_words(url: str) -> None:
    with Client(url) as client:
        with pytest.raises(InvalidRequestError, match="input\\[1\\] is unreadable") as refused:
            client.embeddings([RED, b"text"])
        assert (refused.value.status, refused.value.code, refused.value.param) == (422, "unreadable_image", "input[1]")
        with pytest.raises(NotFoundError, match="unknown model 'color'"):
            client.verify(RED, BLUE, model="color")
        with pytest.raises(InvalidRequestError, match=r"far: 0\.5 was not calibrated"):
            client.verify(RED, BLUE, far=0.5)
        with pytest.raises(TypeError, match="this has shape"):
            client.verify(RED, np.zeros((2, 3)))
        with pytest.raises(TypeError, match="this has dict"):
            client.verify(RED, {})  # type: ignore[arg-type]
        with pytest.raises(FileNotFoundError):
            client.verify(RED, "gone.png")


class Flaky:
    """A server that answers each request with the next of a script, and then with 200."""

    def __init__(self, *script: tuple[int, dict[str, Any] | str, dict[str, str]]) -> None:
        self.script = list(script)
        self.requests: list[tuple[float, str, str, dict[str, str], bytes]] = []
        self.app = FastAPI()
        self.app.add_api_route("/{path:path}", self._answer, methods=["GET", "POST", "PUT", "DELETE"])

    async def _answer(self, request: Request, path: str) -> Response:
        body = await request.body()
        raw = request.scope["raw_path"].decode()
        self.requests.append((time.monotonic(), request.method, raw, dict(request.headers), body))
        status, said, headers = self.script.pop(0) if self.script else (200, {"data": []}, {})
        return Response(said if isinstance(said, str) else json.dumps(said), status, headers)


def refusal(status: int, **headers: str) -> tuple[int, dict[str, Any], dict[str, str]]:
    detail = {"message": f"said {status}", "type": "x", "param": None, "code": "why"}
    return status, {"error": detail}, headers


@pytest.mark.parametrize("status", [429, 503])
def test_it_tries_again_while_the_service_is_busy(status: int) -> None:
    flaky = Flaky(refusal(status), (503, "Request dropped", {}), (500, "Internal Server Error", {}), (502, "", {}))
    with running(flaky.app) as url, Client(url, retries=QUICK) as client:
        assert client.galleries() == []
    assert len(flaky.requests) == 5


def test_both_clients_wait_as_long_as_they_are_asked_to() -> None:
    async def ask(url: str) -> None:
        async with AsyncClient(url, retries=QUICK) as client:
            await client.galleries()

    flaky = Flaky(refusal(429, **{"Retry-After": "1"}))
    with running(flaky.app) as url:
        with Client(url, retries=QUICK) as client:
            client.galleries()
        flaky.script = [refusal(503, **{"Retry-After": "1"})]
        asyncio.run(ask(url))
    times = [request[0] for request in flaky.requests]
    assert times[1] - times[0] >= 1
    assert times[3] - times[2] >= 1


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequestError),
        (401, AuthenticationError),
        (403, AuthenticationError),
        (404, NotFoundError),
        (409, ConflictError),
        (413, InvalidRequestError),
        (422, InvalidRequestError),
        (500, ServiceError),
    ],
)
def test_what_would_fail_again_is_not_tried_again(status: int, kind: type[ServiceError]) -> None:
    flaky = Flaky(refusal(status))
    with running(flaky.app) as url, Client(url, retries=QUICK) as client, pytest.raises(kind, match=f"said {status}"):
        client.galleries()
    assert len(flaky.requests) == 1


def test_the_deadline_bounds_all_tries_together() -> None:
    short = Retries(deadline=0.5, first=0.05, longest=0.1)
    flaky = Flaky(*[refusal(503)] * 1000)
    with running(flaky.app) as url:
        with Client(url, retries=short) as client, pytest.raises(UnavailableError, match="said 503"):
            client.galleries()
        assert 3 < len(flaky.requests) < 100
        flaky.script = [refusal(429, **{"Retry-After": "60"})] * 2
        with Client(url, retries=short) as client, pytest.raises(RateLimitError):
            client.galleries()
        assert len(flaky.script) == 1, "the wait that was asked for is longer than there is time"


def test_a_server_that_is_away_is_tried_again_and_then_named_unavailable() -> None:
    short = Retries(deadline=0.3, first=0.05)
    with Client("http://127.0.0.1:9", retries=short) as client, pytest.raises(UnavailableError, match="ConnectError"):
        client.ready()
    with Client("ftp://127.0.0.1", retries=QUICK) as client, pytest.raises(UnavailableError, match="Unsupported"):
        client.ready()


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_an_address_that_is_none_is_refused_at_once(kind: type[Client] | type[AsyncClient]) -> None:
    with pytest.raises(ServiceError, match=r"url: 'http://127.0.0.1:80O0' .*'80O0'.*; valid: http://HOST:PORT"):
        kind("http://127.0.0.1:80O0")


def test_an_answer_that_cannot_be_unpacked_is_an_error_of_the_service() -> None:
    async def ask(url: str) -> None:
        async with AsyncClient(url, retries=QUICK) as client:
            await client.models()

    garbled = (200, "no gzip", {"Content-Encoding": "gzip"})
    flaky = Flaky(garbled, garbled)
    with running(flaky.app) as url:
        with Client(url, retries=QUICK) as client, pytest.raises(ServiceError, match="DecodingError"):
            client.models()
        with pytest.raises(ServiceError, match="DecodingError"):
            asyncio.run(ask(url))
    assert len(flaky.requests) == 2, "it is not tried again"


def test_a_deletion_whose_answer_was_lost_has_succeeded_when_nothing_is_there() -> None:
    gone = httpx.Response(404, json={"error": {"message": "no such gallery", "type": "x", "param": None, "code": None}})
    steps = calls.steps(calls.delete_gallery("shop"), QUICK)
    next(steps)
    assert isinstance(steps.send(httpx.ReadError("reset")), calls.Wait)
    steps.send(None)
    with pytest.raises(StopIteration):
        steps.send(gone)
    steps = calls.steps(calls.delete_gallery("shop"), QUICK)
    next(steps)
    with pytest.raises(NotFoundError, match="no such gallery"):
        steps.send(gone)


def test_waits_grow_are_spread_and_never_exceed_the_deadline() -> None:
    spread = [Tries(Retries(deadline=1000)) for _ in range(200)]
    for failed in range(8):
        waits = [tries.wait(None) for tries in spread]
        most = min(8.0, 0.2 * 2**failed)
        assert all(wait is not None and 0 <= wait <= most for wait in waits)
        assert max(wait or 0 for wait in waits) > 0.9 * most
        assert min(wait or 0 for wait in waits) < 0.1 * most
    for text, seconds in (("3", 3.0), ("soon", None), ("", None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)):
        assert retry_after(httpx.Response(503, headers={"Retry-After": text})) == seconds
    with pytest.raises(ValueError, match="deadline: 0 is no time"):
        Retries(deadline=0)


def test_answers_that_are_no_answers_are_errors_of_the_service() -> None:
    flaky = Flaky((200, "<html>", {}), (200, {"rows": []}, {}), (404, "<h1>Not here</h1>", {}))
    with running(flaky.app) as url, Client(url, retries=QUICK) as client:
        for _ in range(2):
            with pytest.raises(ServiceError, match="in a form that this client does not know"):
                client.models()
        with pytest.raises(NotFoundError, match="HTTP 404: <h1>Not here"):
            client.models()


def test_a_gallery_from_its_making_to_its_end(
    url: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with Client(url) as client:
        assert client.galleries() == []
        assert (client.create_gallery("shop", keep_images=True).items, client.gallery("shop").keep_images) == (0, True)
        rows = [(f"row/{number:03}", [1.0, number / 10, 0.0]) for number in range(70)]
        assert client.add("shop", [("red", RED, {"price": 3}), *rows]) == 71
        assert client.add("shop", [("red", PINK, {"price": 4})]) == 1, "the same id replaces"
        made = client.gallery("shop")
        assert (made.items, made.model) == (71, "colour@7")
        found = client.search("shop", files["pink"], 2, far=0.001)
        assert (found.data[0].id, found.data[0].metadata, found.data[0].match) == ("red", {"price": 4}, True)
        assert (found.data[1].metadata, found.calibration, found.model) == ({}, CALIBRATION.id, "colour@7")
        assert found.data[1].distance == pytest.approx(client.verify(PINK, rows[2][1]).distance, abs=0.06)
        assert [row["id"] for row in client.items("shop", after="row/067")] == ["row/068", "row/069"]
        client.delete_item("shop", "row/001")
        with pytest.raises(NotFoundError, match="no item 'row/001'"):
            client.delete_item("shop", "row/001")
        assert main(["--url", url, "search", "shop", str(files["pink"]), "-k", "1"]) == 0
        assert "match  red  price=4\n1 of gallery shop, threshold 0.9" in capsys.readouterr().out
        client.delete_gallery("shop")
        with pytest.raises(NotFoundError, match="shop"):
            client.gallery("shop")


def test_galleries_are_asked_for_by_the_contracts_paths() -> None:
    gallery = {"name": "shop", "items": 2, "model": "colour@7", "keep_images": True, "index": "flat"}
    hit = {"id": "a/b", "metadata": {"price": 3}, "distance": 0.5, "similarity": 0.875, "match": True}
    result = {"data": [hit], "gallery": "shop", "model": "colour@7", "threshold": 0.7, "operating_point": None}
    flaky = Flaky(
        (200, gallery, {}),
        (200, {}, {}),
        (200, result, {}),
        (200, {"data": [{"id": "a/b"}]}, {}),
        (200, {}, {}),
        (204, "", {}),
    )
    with running(flaky.app) as url, Client(url, key="k", retries=QUICK) as client:
        made = client.create_gallery("shop", keep_images=True)
        assert (made.items, made.model, made.keep_images, made.details["index"]) == (2, "colour@7", True, "flat")
        assert client.add("shop", [("a/b", RED, {"price": 3}), ("c", [1.0, 0, 0])]) == 2
        found = client.search("shop", [1.0, 0.0, 0.0], 1, far=0.1)
        assert (found.data[0].id, found.data[0].metadata, found.data[0].match) == ("a/b", {"price": 3}, True)
        assert client.items("shop", after="A", limit=5) == [{"id": "a/b"}]
        client.delete_item("shop", "a/b")
        client.delete_gallery("shop")
    assert [(method, path) for _, method, path, _, _ in flaky.requests] == [
        ("PUT", "/v1/galleries/shop"),
        ("POST", "/v1/galleries/shop/items"),
        ("POST", "/v1/search"),
        ("GET", "/v1/galleries/shop/items"),
        ("DELETE", "/v1/galleries/shop/items/a%2Fb"),
        ("DELETE", "/v1/galleries/shop"),
    ]
    bodies = [json.loads(body) for *_, body in flaky.requests if body]
    assert bodies[0] == {"keep_images": True}
    assert [set(row) for row in bodies[1]["items"]] == [{"id", "input", "metadata"}, {"id", "input"}]
    assert bodies[2] == {"gallery": "shop", "query": [1.0, 0.0, 0.0], "k": 1, "far": 0.1}
    assert all(headers["authorization"] == "Bearer k" for *_, headers, _ in flaky.requests)


def test_the_key_comes_from_the_environment_unless_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    flaky = Flaky()
    with running(flaky.app) as url:
        for environment, given in (("", None), ("secret", None), ("secret", "other"), ("secret", "")):
            monkeypatch.setenv("ONETHRESHOLD_KEY", environment)
            with Client(url, key=given) as client:
                client.galleries()
    sent = [headers.get("authorization") for *_, headers, _ in flaky.requests]
    assert sent == [None, "Bearer secret", "Bearer other", None]


def test_it_starts_without_torch_and_ray() -> None:
    heavy = {"torch", "ray", "fastapi", "mlflow", "PIL"}
    code = f"import sys, serve.client.__main__; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout == "[]\n"


def test_the_command_verifies_with_a_status_for_each_outcome(
    url: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    red, pink, blue = (str(files[name]) for name in ("red", "pink", "blue"))
    assert main(["--url", url, "verify", red, pink, "--far", "0.01"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("match\n")
    assert f"set for FAR 0.01 by calibration {CALIBRATION.id}: FAR 0.01 (0.005 to 0.02)" in said
    assert "colour@7" in said
    assert main(["--url", url, "verify", red, blue, "--threshold", "1.2"]) == 1
    assert "no match\n  distance   1.4142 > 1.2000" in capsys.readouterr().out
    for words, says in (
        (["verify", red, "gone.png"], "error: gone.png: No such file or directory\n"),
        (["verify", red, blue, "--far", "0.5"], "far: 0.5 was not calibrated"),
        (["search", "shop", red], "error: "),
        (["--deadline", "0", "models"], "deadline: 0.0 is no time"),
    ):
        assert main(["--url", url, *words]) == 2
        shown = capsys.readouterr()
        assert says in shown.err
        assert len(shown.err.splitlines()) == 1
    with pytest.raises(SystemExit) as stopped:
        main(["verify", red, blue, "--far", "0.1", "--threshold", "1"])
    assert stopped.value.code == 2
    assert main(["--url", "http://127.0.0.1:80O0", "verify", red, red]) == 2
    assert "error: url: 'http://127.0.0.1:80O0'" in capsys.readouterr().err


def test_the_command_never_says_no_match_when_it_fails(
    url: str, files: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(calls, "verify", fails)
    assert main(["--url", url, "verify", str(files["red"]), str(files["red"])]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_the_command_embeds_and_lists_models(
    url: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    red, blue = str(files["red"]), str(files["blue"])
    assert main(["--url", url, "embed", red, blue]) == 0
    assert capsys.readouterr().out == f"{red} 1 0 0\n{blue} 0 0 1\n"
    assert main(["--url", url, "embed", red, blue, "--out", str(tmp_path / "rows.npy")]) == 0
    assert capsys.readouterr().out.endswith("2 embeddings of 3 dimensions\n")
    np.testing.assert_allclose(np.load(tmp_path / "rows.npy"), [[1, 0, 0], [0, 0, 1]], atol=1e-6)
    assert main(["--url", url, "models"]) == 0
    assert capsys.readouterr().out.startswith("colour@7: 3 dimensions, 8 px\n")


def test_the_command_prints_the_nearest_items(capsys: pytest.CaptureFixture[str], files: dict[str, Path]) -> None:
    hits = [
        {"id": "a", "metadata": {"price": 3}, "distance": 0.5, "similarity": 0.875, "match": True},
        {"id": "b", "metadata": {}, "distance": 1.5, "similarity": -0.125, "match": False},
    ]
    result = {"data": hits, "gallery": "shop", "model": "colour@7", "threshold": 0.7, "operating_point": None}
    with running(Flaky((200, result, {})).app) as url:
        assert main(["--url", url, "search", "shop", str(files["red"]), "-k", "2"]) == 0
    assert capsys.readouterr().out == (
        "  0.5000  match  a  price=3\n  1.5000         b\n2 of gallery shop, threshold 0.7000, colour@7\n"
    )

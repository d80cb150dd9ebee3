"""What stands before the app, without the app: what is refused, before how much of it was read."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from serve import access, gate, keys, rates
from serve.gate import Gate
from serve.limits import Limits
from serve.schemas import ApiError

KEY, LINE = keys.new("shop")
KNOWN = keys.Keys.parse(LINE, "here")


@dataclass
class Exchange:
    """One request, and what came of it."""

    path: str = "/v1/embeddings"
    headers: dict[str, str] = field(default_factory=dict)
    chunks: Iterable[bytes] = (b"",)
    client: str = "127.0.0.1"
    pause: float = 0.0
    read: int = 0
    sent: list[Message] = field(default_factory=list)

    async def through(self, app: Any) -> "Exchange":
        headers = [(name.lower().encode(), value.encode()) for name, value in self.headers.items()]
        scope = {
            "type": "http", "method": "POST", "path": self.path, "headers": headers, "client": (self.client, 1),
        }  # fmt: skip
        chunks = iter(self.chunks)

        async def receive() -> Message:
            await asyncio.sleep(self.pause)
            chunk = next(chunks, None)
            if chunk is None:
                return {"type": "http.disconnect"}
            self.read += len(chunk)
            return {"type": "http.request", "body": chunk, "more_body": not chunk.endswith(b"!")}

        async def send(message: Message) -> None:
            self.sent.append(message)

        await app(scope, receive, send)
        return self

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def answer_headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def error(self) -> dict[str, Any]:
        assert [message["type"] for message in self.sent] == ["http.response.start", "http.response.body"]
        body = json.loads(self.sent[1]["body"])
        assert set(body) == {"error"}
        return dict(body["error"])


def ask(app: Any, **request: Any) -> Exchange:
    return asyncio.run(Exchange(**request).through(app))


def answering(
    status: int = 200, media: str = "application/json", then: Callable[[], Awaitable[None]] | None = None
) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """An app that reads the body and answers with its length."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        assert not message["more_body"], "the body comes in one piece"
        if then is not None:
            await then()
        headers = [(b"content-type", media.encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": str(len(message["body"])).encode()})

    return app


async def never(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("it is not to be reached")


def test_a_body_is_handed_on_whole() -> None:
    asked = ask(Gate(answering(), Limits()), chunks=[b"abc", b"", b"de!"])
    assert (asked.status, asked.sent[1]["body"]) == (200, b"6")


def test_a_body_without_end_is_read_no_further_than_the_limit() -> None:
    asked = ask(Gate(never, Limits(request_bytes=1000)), chunks=[b"x" * 300] * 100)
    assert (asked.read, asked.status, asked.error["code"]) == (1200, 413, "request_too_large")


def test_a_declared_length_is_refused_unread() -> None:
    asked = ask(Gate(never, Limits(request_bytes=1000)), headers={"Content-Length": "1001"}, chunks=[b"x"] * 5)
    assert (asked.read, asked.status) == (0, 413)


def test_a_client_that_leaves_is_not_answered() -> None:
    assert ask(Gate(never, Limits()), chunks=[b"half"]).sent == []


def test_a_key_is_asked_for_before_anything_is_read() -> None:
    door = Gate(answering(), Limits(), KNOWN)
    for authorization in ("", "Bearer wrong", f"Basic {KEY}"):
        asked = ask(door, headers={"Authorization": authorization}, chunks=[b"x"] * 5)
        assert (asked.status, asked.error["code"], asked.read) == (401, "invalid_api_key", 0)
        assert asked.answer_headers["www-authenticate"] == "Bearer"
    assert ask(door, headers={"Authorization": f"Bearer {KEY}"}, chunks=[b"!"]).status == 200


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/page/page.js", "/docs/files/swagger-ui.css"])
def test_probes_and_the_pages_need_no_key(path: str) -> None:
    assert ask(Gate(answering(), Limits(), KNOWN), path=path, client="10.0.0.9", chunks=[b"!"]).status == 200


def test_what_needs_no_key_takes_nothing_from_those_who_have_one() -> None:
    door = Gate(answering(), Limits(requests_under_way=1, bytes_under_way=1000, requests_per_second=1), KNOWN)

    async def without_and_with() -> None:
        crowd = [Exchange(path=path, chunks=[b"x" * 1000] * 9) for path in ("/", "/healthz", "/docs", "/page/x") * 9]
        for asked in await asyncio.gather(*(one.through(door) for one in crowd)):
            assert (asked.status, asked.sent[1]["body"], asked.read) == (200, b"0", 0), "its body is not read"
        released = asyncio.Event()
        slow = Gate(answering(then=released.wait), door.limits, KNOWN)  # type: ignore[arg-type]
        waiting = [asyncio.create_task(Exchange(path="/readyz", chunks=[b"x"]).through(slow)) for _ in range(9)]
        keyed = Exchange(headers={"Authorization": f"Bearer {KEY}"}, chunks=[b"x" * 999 + b"!"])
        answered = asyncio.create_task(keyed.through(slow))
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in [answered, *waiting])
        released.set()
        assert (await answered).status == 200
        assert {asked.status for asked in await asyncio.gather(*waiting)} == {200}

    asyncio.run(without_and_with())


def test_a_body_that_is_not_read_is_kept_from_the_app_too() -> None:
    async def waits_for_the_end(scope: Scope, receive: Receive, send: Send) -> None:
        assert await receive() == {"type": "http.request", "body": b"", "more_body": False}
        assert (await receive())["type"] == "http.disconnect"

    asked = ask(Gate(waits_for_the_end, Limits(), KNOWN), path="/healthz", chunks=[b"x" * 1000] * 9)
    assert (asked.read, asked.sent) == (9000, []), "read, and let go"


@pytest.mark.parametrize("path", ["/v1/models", "/page", "/healthz/", "//", "/v1/embeddings", "/-/routes"])
def test_all_else_does(path: str) -> None:
    assert ask(Gate(never, Limits(), KNOWN), path=path).status == 401


def test_without_keys_other_machines_are_refused() -> None:
    door = Gate(answering(), Limits(), keys.Keys({}))
    assert ask(door, chunks=[b"!"]).status == 200
    asked = ask(door, client="10.0.0.9")
    assert (asked.status, asked.error["code"]) == (403, "no_api_keys")
    for host in ("127.0.0.1:8000", "localhost", "[::1]:8000"):
        assert ask(door, headers={"Host": host}, chunks=[b"!"]).status == 200
    assert ask(door, headers={"Host": "rebound.example.org:8000"}).status == 403, "a page that was made to point here"
    assert ask(Gate(answering(), Limits()), client="10.0.0.9", chunks=[b"!"]).status == 200, "where nobody asks"


def test_requests_a_second_by_key() -> None:
    other, line = keys.new("lab")
    known = keys.Keys.parse(f"{LINE}\n{line}", "here")
    door = Gate(answering(), Limits(requests_per_second=1), known)

    def one(key: str) -> Exchange:
        return ask(door, headers={"Authorization": f"Bearer {key}"}, chunks=[b"!"])

    assert [one(KEY).status for _ in range(3)] == [200, 200, 429], "bursts of two seconds' worth"
    refused = one(KEY)
    assert (refused.error["code"], int(refused.answer_headers["retry-after"])) == ("rate_limited", 1)
    assert one(other).status == 200, "another key has a rate of its own"


def test_a_bucket_refills_and_images_are_paid_off_afterwards() -> None:
    now = 0.0
    held = rates.Rates(Limits(requests_per_second=10, images_per_second=4), lambda: now)
    held.admit("shop")
    held.draw_images("shop", 16)  # 8 in the bucket, so 8 beyond: two seconds' worth
    with pytest.raises(ApiError) as refused:
        held.admit("shop")
    assert (refused.value.status, refused.value.retry_after) == (429, 3)
    assert "more than 4 images a second" in refused.value.message
    held.admit("lab")
    now = 2.1
    held.admit("shop")


def test_images_are_counted_by_what_the_app_says_of_them() -> None:
    async def embeds() -> None:
        access.saw("colour@7", 30)

    door = Gate(answering(then=embeds), Limits(images_per_second=10))
    asked = ask(door, chunks=[b"!"])
    assert (asked.answer_headers["x-onethreshold-images"], asked.answer_headers["x-onethreshold-model"]) == (
        "30",
        "colour@7",
    )
    assert ask(door, chunks=[b"!"]).status == 429
    outer = Gate(Gate(answering(then=embeds), Limits()), Limits(images_per_second=10), proxy=True)
    assert [ask(outer, chunks=[b"!"]).status for _ in range(2)] == [200, 429], "by its headers, from another process"


def test_requests_and_bytes_under_way_are_bounded() -> None:
    released = asyncio.Event()
    limits = Limits(requests_under_way=3, bytes_under_way=1000)

    async def all_at_once() -> None:
        door = Gate(answering(then=released.wait), limits)  # type: ignore[arg-type]
        under_way = [asyncio.create_task(Exchange(chunks=[b"x" * 399 + b"!"]).through(door)) for _ in range(2)]
        await asyncio.sleep(0.01)
        large = await Exchange(chunks=[b"x" * 399 + b"!"]).through(door)
        assert (large.status, large.error["code"], large.answer_headers["retry-after"]) == (503, "overloaded", "1")
        under_way.append(asyncio.create_task(Exchange(chunks=[b"!"]).through(door)))
        await asyncio.sleep(0.01)
        many = await Exchange(chunks=[b"!"]).through(door)
        assert (many.status, many.read) == (503, 0)
        probe = asyncio.create_task(Exchange(path="/healthz").through(door))
        await asyncio.sleep(0.01)
        assert not probe.done(), "probes are let in"
        released.set()
        assert (await probe).status == 200
        assert [asked.status for asked in await asyncio.gather(*under_way)] == [200] * 3
        assert (await Exchange(chunks=[b"!"]).through(door)).status == 200

    asyncio.run(all_at_once())


def test_what_is_not_sent_or_not_answered_in_time() -> None:
    async def forever() -> None:
        await asyncio.sleep(60)

    limits = Limits(seconds=0.05)
    slow = ask(Gate(never, limits), chunks=[b"x"] * 1000, pause=0.01)
    assert (slow.status, slow.error["code"]) == (408, "request_timeout")
    late = ask(Gate(answering(then=forever), limits), chunks=[b"!"])
    assert (late.status, late.error["code"]) == (503, "timeout")
    assert int(late.answer_headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("status", "media", "shown", "code"),
    [
        (503, "text/plain", 503, "overloaded"),
        (408, "text/plain", 503, "timeout"),
        (404, "text/plain", 503, "starting"),
        (500, "text/plain", 503, "overloaded"),
        (404, "application/json", 404, None),
    ],
)
def test_what_serve_says_in_its_own_way_is_put_into_ours(status: int, media: str, shown: int, code: str | None) -> None:
    asked = ask(Gate(answering(status, media), Limits(), proxy=True), chunks=[b"!"])
    assert asked.status == shown
    if code:
        assert asked.error["code"] == code
        assert "retry-after" in asked.answer_headers


def test_a_replica_that_ends_before_it_answers_is_a_503() -> None:
    async def lost(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    asked = ask(Gate(lost, Limits(), proxy=True), chunks=[b"!"])
    assert (asked.status, asked.error["code"]) == (503, "replica_lost")


def test_a_client_that_leaves_before_its_answer_gets_none() -> None:
    async def gone(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        assert (await receive())["type"] == "http.disconnect"

    assert ask(Gate(gone, Limits(), proxy=True), chunks=[b"!"]).sent == []


def test_clients_cannot_give_serve_orders() -> None:
    seen: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(name for name, _ in scope["headers"])
        await answering()(scope, receive, send)

    orders = [
        "X-Request-Timeout-Seconds",
        "X-Request-Disconnect-Disabled",
        "serve_multiplexed_model_id",
        "X_Session_Id",
    ]
    ask(Gate(app, Limits()), headers={**dict.fromkeys(orders, "0"), "Accept": "x"}, chunks=[b"!"])
    assert seen == [b"accept"]


def test_one_line_a_request_in_the_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "log", logging.getLogger("access"))  # Ray's own loggers keep lines from pytest
    with caplog.at_level(logging.INFO, "access"):
        ask(
            Gate(answering(), Limits(), KNOWN),
            path="/v1/x\nfake 200",
            headers={"Authorization": f"Bearer {KEY}"},
            chunks=[b"secret!"],
        )
        ask(Gate(never, Limits(), KNOWN))
        ask(Gate(answering(), Limits(), proxy=True), chunks=[b"!"])
    answered, refused = [record.message for record in caplog.records]
    assert answered.startswith(r"POST /v1/x\nfake 200 200 ")
    assert answered.endswith(" ms 0 images 7 bytes key=shop model=-")
    assert refused.startswith("POST /v1/embeddings 401 invalid_api_key ")
    assert "secret" not in caplog.text
    assert KEY not in caplog.text


def test_the_proxy_reads_its_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in gate.environment(Limits(images=7), KNOWN).items():
        monkeypatch.setenv(name, value)
    assert "images_per_second" not in gate.environment(Limits(), KNOWN)[gate.LIMITS], "defaults stay those of the proxy"
    [made] = gate.middlewares()
    door = made.cls(never, *made.args, **made.kwargs)
    assert isinstance(door, Gate)
    assert (door.limits, door.known, door.proxy) == (Limits(images=7), KNOWN, True)

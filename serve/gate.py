"""What stands before the app: keys, rates, how much is read and how much is under way.

It is ASGI middleware, and stands twice: in each replica, and in Ray Serve's proxy, where it keeps what would overload
the service from being read or queued at all. The proxy by itself holds bodies without bound, lets clients switch its
time-outs off, and answers in a shape of its own.
"""

import asyncio
import os
from collections.abc import Mapping

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import access, keys
from serve.limits import Limits
from serve.rates import Rates
from serve.schemas import ApiError, error_response

CALLBACK = "serve.gate.middlewares"
"""For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, in the environment of Ray before it starts."""
LIMITS = "ONETHRESHOLD_LIMITS"
"""Environment variable: limits of the proxy's gate that differ from the defaults, as JSON."""
OPEN = ("/", "/healthz", "/readyz", "/docs", "/openapi.json", "/-/healthz")
"""Paths that need no key: probes, and what shows or describes the service and holds no data. Bodies are not read."""
ASSETS = ("/page/", "/docs/")
"""What the pages at / and /docs are made of; open as well."""
IMAGES = b"x-onethreshold-images"
MODEL = b"x-onethreshold-model"
# By these a client would switch off Serve's time-out, outlive its connection, or choose its replica.
_REMOVED = {
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"serve-multiplexed-model-id",
    b"x-session-id",
}


def environment(limits: Limits, known: keys.Keys) -> dict[str, str]:
    """What puts the gate into the proxies of a Ray that is started with it."""
    return {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": CALLBACK,
        LIMITS: limits.model_dump_json(exclude_defaults=True),
        keys.ENVIRONMENT: known.lines(),
    }


def middlewares() -> list[Middleware]:
    """The gate of Ray Serve's proxy, which calls this when it starts; settings come from its environment."""
    limits = Limits.model_validate_json(os.environ.get(LIMITS) or "{}")
    return [Middleware(Gate, limits=limits, known=keys.Keys.find(None), proxy=True)]


class Gate:
    """ASGI middleware: refuses before it reads, reads within bounds, and then hands on the whole body at once.

    Args:
        app: what answers the requests that pass.
        limits: the most that is let through.
        known: the API keys; without any in it only this machine is served. None: whoever asks is.
        proxy: whether it stands in Ray Serve's proxy, whose own answers are put into our shape.
    """

    def __init__(self, app: ASGIApp, limits: Limits, known: keys.Keys | None = None, *, proxy: bool = False) -> None:
        self.app = app
        self.limits = limits
        self.known = known
        self.proxy = proxy
        self._rates = Rates(limits)
        self._requests = 0
        self._bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Without the prefix of a Serve application that is not the only one.
        record = access.Record(scope["method"], scope["path"].removeprefix(scope.get("root_path", "")))
        with access.noted(record, all_answers=not self.proxy):
            try:
                await self._guarded(_without(scope), receive, send, record)
            except ApiError as error:
                record.status, record.code = error.status, error.code or ""
                await error_response(error)(scope, receive, send)
            except Exception:
                record.status, record.code = 500, "server_error"
                raise

    async def _guarded(self, scope: Scope, receive: Receive, send: Send, record: access.Record) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        # What needs no key takes nothing from those who have one: it is not counted, and its body is not read.
        counted = not _open(record.path)
        if counted:
            record.key = self._name(scope, headers)
            self._rates.admit(record.key)
            if self._requests >= self.limits.requests_under_way:
                raise overloaded(f"{self._requests} requests are under way")
        answer = _Answer(send, record, self.proxy and not record.path.startswith("/-/"))
        body = None if counted else b""
        self._requests += counted
        try:
            async with asyncio.timeout(self.limits.seconds) as deadline:
                if body is None:
                    body = await self._body(headers, receive, record)
                if body is None:
                    return
                # Serve's proxy swallows the cancellation at the deadline, so that it is asked for below.
                replay = _Replay(body, receive)
                await self.app(scope, replay.receive, answer.send)
                if replay.left:
                    return
        except TimeoutError:
            if not deadline.expired():
                raise
        finally:
            self._requests -= counted
            self._bytes -= record.bytes
            self._rates.draw_images(record.key, record.images)
            record.route = getattr(scope.get("route"), "path", "other")
        if body is None:
            message = f"the request was not sent within {self.limits.seconds:g} s"
            raise ApiError(408, message, code="request_timeout")
        answer.finish(expired=deadline.expired(), limits=self.limits)

    def _name(self, scope: Scope, headers: Mapping[bytes, bytes]) -> str:
        """The name of the client's key; empty where no keys are asked for."""
        if self.known is None:
            return ""
        if self.known.hashes:
            name = self.known.name_of(headers.get(b"authorization", b"").decode("latin-1"))
            if name is None:
                raise ApiError(401, "no valid API key; send one as Authorization: Bearer KEY", code="invalid_api_key")
            return name
        # The name that the client used too: another one may be a page's that was made to point here.
        host = _hostname(headers.get(b"host", b"127.0.0.1").decode("latin-1"))
        if not (keys.is_loopback(host) and keys.is_loopback((scope.get("client") or ("",))[0])):
            message = "this service has no API keys, so that only the machine it runs on may use it, as 127.0.0.1"
            raise ApiError(403, message, code="no_api_keys")
        return ""

    async def _body(self, headers: Mapping[bytes, bytes], receive: Receive, record: access.Record) -> bytes | None:
        """The whole body, counted as it comes; None when the client leaves before its end."""
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit():
            self._check_length(int(declared[:20]))
        chunks: list[bytes] = []
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None
            chunk, more = message.get("body", b""), message.get("more_body", False)
            self._check_length(record.bytes + len(chunk))
            if self._bytes + len(chunk) > self.limits.bytes_under_way:
                raise overloaded(f"requests of {self._bytes:,} bytes are under way")
            self._bytes += len(chunk)
            record.bytes += len(chunk)
            chunks.append(chunk)
        return b"".join(chunks)

    def _check_length(self, size: int) -> None:
        if size > self.limits.request_bytes:
            message = f"the request is longer than {self.limits.request_bytes:,} bytes"
            raise ApiError(413, message, code="request_too_large")


def overloaded(what: str, retry_after: float = 1.0) -> ApiError:
    """The answer to a request that would have to wait too long."""
    return ApiError(503, f"overloaded: {what}; try again", code="overloaded", retry_after=retry_after)


class _Answer:
    """Passes the app's answer on, with its model and images in headers; keeps back what Serve says in its own way."""

    def __init__(self, send: Send, record: access.Record, rewrite: bool) -> None:
        self._send = send
        self._record = record
        self._rewrite = rewrite
        self._begun = False
        self._foreign: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers: list[tuple[bytes, bytes]] = [(bytes(k).lower(), bytes(v)) for k, v in message["headers"]]
            named = dict(headers)
            if self._rewrite and message["status"] >= 400 and named.get(b"content-type") != b"application/json":
                self._foreign = message["status"]
                return
            self._begun = True
            record = self._record
            record.status = message["status"]
            record.images = int(named.get(IMAGES, record.images))
            record.model = named.get(MODEL, record.model.encode("latin-1", "replace")).decode("latin-1")
            if record.images and IMAGES not in named:
                headers.append((IMAGES, str(record.images).encode()))
            if record.model and MODEL not in named:
                headers.append((MODEL, record.model.encode("latin-1", "replace")))
            message = {**message, "headers": headers}
        if self._foreign is None:
            await self._send(message)

    def finish(self, *, expired: bool, limits: Limits) -> None:
        """Answers what the app did not.

        Raises:
            ApiError: 503, and why.
        """
        if self._begun:
            return
        if expired or self._foreign == 408:
            raise ApiError(503, f"there was no answer within {limits.seconds:g} s; try again", code="timeout")
        if self._foreign == 404:
            raise ApiError(503, "the service is being started; try again", code="starting")
        if self._foreign is not None:
            raise overloaded("no replica can take the request now")
        raise ApiError(503, "the replica that was to answer has ended; try again", code="replica_lost", retry_after=1)


def _open(path: str) -> bool:
    return path in OPEN or path.startswith(ASSETS)


def _hostname(host: str) -> str:
    """Of a Host header: without the port, and without the brackets of IPv6."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _without(scope: Scope) -> Scope:
    kept = [(name, value) for name, value in scope["headers"] if name.lower().replace(b"_", b"-") not in _REMOVED]
    return {**scope, "headers": kept}


class _Replay:
    """The body in one piece, then what the client does next, which is to leave."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self.left = False
        self._body: bytes | None = body
        self._receive = receive

    async def receive(self) -> Message:
        if self._body is None:
            while (message := await self._receive())["type"] == "http.request":
                pass  # of a body that is not read
            self.left = True
            return message
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

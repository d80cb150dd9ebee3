"""How much one request may ask for, and the middleware that stops reading a body that is longer."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.schemas import ApiError, error_response

Count = Annotated[int, Field(ge=1)]


class Limits(BaseModel):
    """The most that one request may carry; what exceeds it is answered with 413."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    images: Count = 64
    """Images a request."""
    image_bytes: Count = 8 * 2**20
    """Bytes an image, after base64."""
    request_bytes: Count = 32 * 2**20
    """Bytes of a request's body."""
    pixels: Count = 40_000_000
    """Width x height of an image, read from its header before any pixel is decoded."""
    aspect: Count = 100
    """Longer over shorter side of an image: a strip would grow without bound when its short side is resized."""


class BodyLimit:
    """ASGI middleware that answers 413 as soon as a body is known to be longer than allowed, and reads no further.

    Args:
        app: what answers the requests that fit.
        request_bytes: the longest body.
    """

    def __init__(self, app: ASGIApp, request_bytes: int) -> None:
        self.app = app
        self.request_bytes = request_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = error_response(
            ApiError(413, f"the request is longer than {self.request_bytes:,} bytes", code="request_too_large")
        )
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > self.request_bytes:
            await refusal(scope, receive, send)
            return
        seen, refused = 0, False

        async def counted() -> Message:
            nonlocal seen, refused
            message = await receive()
            seen += len(message.get("body", b""))
            if seen <= self.request_bytes:
                return message
            if not refused:
                refused = True
                await refusal(scope, receive, send)
            # The app stops reading as if the client had gone; what it then answers is dropped below.
            return {"type": "http.disconnect"}

        async def guarded(message: Message) -> None:
            if not refused:
                await send(message)

        await self.app(scope, counted, guarded)

"""GET /: a page to try the service by hand, in plain HTML, CSS and JavaScript, all of it from this package."""

from importlib import resources
from typing import Any

from fastapi import APIRouter, Response

TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
    "chart.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
HEADERS = {
    # Images that a person picks are shown from blob: addresses; nothing else comes from elsewhere or inline.
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def routes() -> APIRouter:
    """GET / and what it loads, from /page/; none of them needs a key."""
    router = APIRouter(include_in_schema=False)
    for name, media in TYPES.items():
        content = (resources.files(__package__) / name).read_bytes()
        path = "/" if name == "index.html" else f"/page/{name}"
        router.add_api_route(path, _sends(content, media), methods=["GET", "HEAD"], name=f"page {name}")
    return router


def _sends(content: bytes, media: str) -> Any:
    async def send() -> Response:
        return Response(content, media_type=media, headers=HEADERS)

    return send

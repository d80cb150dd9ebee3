"""A client of the service: `Client`, `AsyncClient`, and `python -m serve.client`.

    with Client("http://127.0.0.1:8000") as client:
        client.verify("a.png", "b.png", far=0.01).match

It needs httpx and NumPy alone: neither torch nor Ray is imported.
"""

from serve.client.answers import Gallery, Hit, Model, OperatingPoint, Ready, SearchResult, Verification
from serve.client.client import AsyncClient, Client
from serve.client.errors import (
    AuthenticationError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    RateLimitError,
    ServiceError,
    UnavailableError,
)
from serve.client.retries import Retries

__all__ = [
    "AsyncClient",
    "AuthenticationError",
    "Client",
    "ConflictError",
    "Gallery",
    "Hit",
    "InvalidRequestError",
    "Model",
    "NotFoundError",
    "OperatingPoint",
    "RateLimitError",
    "Ready",
    "Retries",
    "SearchResult",
    "ServiceError",
    "UnavailableError",
    "Verification",
]

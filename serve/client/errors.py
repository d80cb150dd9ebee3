"""What can go wrong with a request, in types."""

import json

import httpx

SHOWN = 200
"""Characters of an answer that is not the service's own."""


class ServiceError(Exception):
    """The service refused, failed or could not be reached.

    Attributes:
        message: what is wrong and what would be right.
        status: HTTP status; 0 when there was no answer.
        code: a word for programs, e.g. image_too_large; None when the answer has none.
        param: the field that is wrong, e.g. input[3]; None when the answer names none.
    """

    def __init__(self, message: str, *, status: int = 0, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param


class InvalidRequestError(ServiceError):
    """What was sent is wrong: 400, 413, 415, 422."""


class AuthenticationError(ServiceError):
    """The key is missing, unknown, or not allowed to: 401, 403."""


class NotFoundError(ServiceError):
    """There is no such model, gallery or item: 404."""


class ConflictError(ServiceError):
    """The state of a gallery forbids it, e.g. another model made it: 409."""


class RateLimitError(ServiceError):
    """Too many requests for this key, and waiting did not help in time: 429."""


class UnavailableError(ServiceError):
    """Not reached, not ready or overloaded, and trying again did not help in time: 503, or no answer at all."""


_TYPES: dict[int, type[ServiceError]] = {
    400: InvalidRequestError,
    401: AuthenticationError,
    403: AuthenticationError,
    404: NotFoundError,
    409: ConflictError,
    413: InvalidRequestError,
    415: InvalidRequestError,
    422: InvalidRequestError,
    429: RateLimitError,
    503: UnavailableError,
}


def error_of(answer: httpx.Response) -> ServiceError:
    """The error that an answer other than 2xx stands for."""
    kind = _TYPES.get(answer.status_code, ServiceError)
    detail = detail_of(answer)
    if detail is None:
        text = " ".join(answer.text.split())[:SHOWN]
        return kind(f"HTTP {answer.status_code}: {text or 'no words'}", status=answer.status_code)
    return kind(
        str(detail.get("message")), status=answer.status_code, code=detail.get("code"), param=detail.get("param")
    )


def detail_of(answer: httpx.Response) -> dict[str, str | None] | None:
    """What the service itself says is wrong; None when something between here and there answered."""
    try:
        detail = answer.json()["error"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None
    return detail if isinstance(detail, dict) and "message" in detail else None

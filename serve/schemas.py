"""The HTTP interface in types: requests, answers and errors, in the shapes of the OpenAI embeddings API."""

import base64
import binascii
import math
import re
from typing import Annotated, Any, Literal

from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, PlainValidator, model_validator

from dml.metrics.operating_points import OperatingPoint
from dml.names import unknown

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
}
RETRY_AFTER_S = 5


class ApiError(Exception):
    """An answer other than 200.

    Args:
        status: HTTP status.
        message: what is wrong and what would be right; shown to the client, so without paths and traces.
        param: the field that is wrong, e.g. input[3].
        code: a word for programs, e.g. image_too_large.
        retry_after: seconds until another try makes sense; of 429 and 503.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float = RETRY_AFTER_S,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = max(1, math.ceil(retry_after))


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every answer other than 200."""

    error: ErrorDetail


def _image(value: Any) -> str | bytes:
    if isinstance(value, str | bytes):
        return value
    raise ValueError("an image is a string: a data URI or bare base64")


Image = Annotated[str | bytes, PlainValidator(_image, json_schema_input_type=str)]
"""A data URI or bare base64 in JSON; the bytes of an image file in a form or a raw body."""


def _item(value: Any) -> str | bytes | list[float]:
    if isinstance(value, list) and value and all(type(number) in (int, float) for number in value):
        try:
            return [float(number) for number in value]
        except OverflowError:
            raise ValueError("an embedding has a number that is too large") from None
    if isinstance(value, str | bytes):
        return value
    raise ValueError("an item is an image (a data URI or bare base64) or an embedding (a list of numbers)")


ImageOrEmbedding = Annotated[str | bytes | list[float], PlainValidator(_item, json_schema_input_type=str | list[float])]
"""An image, as `Image`, or the numbers of an embedding."""


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str | bytes) else value


class KnownFields(BaseModel):
    """A request whose fields are documented beneath them; one that is unknown is refused with those that are known."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, body: Any) -> Any:
        # Before pydantic's own check, which lists every unknown field of a hostile body.
        if isinstance(body, dict):
            for name in body:
                if name not in cls.model_fields:
                    raise ValueError(unknown("field", str(name)[:100], cls.model_fields))
        return body


class EmbeddingsRequest(KnownFields):
    """Images to embed."""

    # FailFast: a list of a million wrong items gets one error, not a million.
    input: Annotated[
        list[Image],
        FailFast(),
        BeforeValidator(_one_or_many, json_schema_input_type=str | list[str]),
        Field(min_length=1, examples=[["data:image/png;base64,iVBORw0KGgo..."]]),
    ]
    """An image, or a list of them: a data URI (data:image/png;base64,...) or bare base64. URLs are not fetched."""
    model: str | None = None
    """The model that GET /v1/models lists, with or without its version; unset, whatever is served."""
    encoding_format: Literal["float", "base64"] = "float"
    """float: a list of numbers. base64: little-endian float32."""
    dimensions: int | None = None
    """Only the model's own dimension is accepted."""
    user: str | None = None
    """Accepted as OpenAI clients send it, and ignored."""


class Embedding(BaseModel):
    """The embedding of one image."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens; an image has none."""

    prompt_tokens: int = 0
    total_tokens: int = 0


class EmbeddingsAnswer(BaseModel):
    """Embeddings in the order of the images; unit norm."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str = Field(examples=["onethreshold@3"])
    usage: Usage = Usage()


class OperatingPointAnswer(BaseModel):
    """A threshold that was calibrated to a false accept rate, and what it did to the calibration pairs."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    far_target: float
    """The false accept rate that was asked for."""
    threshold: float
    """A Euclidean distance, 0 to 2: what is at it or nearer matches."""
    far: float
    """Accepted negatives / negatives."""
    frr: float
    """Rejected positives / positives."""
    far_interval: tuple[float, float] | None
    """95% interval of the FAR on other classes; null where there were too few."""
    frr_interval: tuple[float, float] | None
    """95% interval of the FRR on other classes; null where there were too few."""
    negatives: int
    """Pairs of two classes that it was calibrated on."""
    positives: int
    """Pairs of one class that it was calibrated on."""

    @classmethod
    def of(cls, point: OperatingPoint) -> "OperatingPointAnswer":
        """An operating point in Euclidean distance, as `serve.calibration.Calibration` has them."""
        return cls(**{name: getattr(point, name) for name in cls.model_fields})


class Health(BaseModel):
    """The process lives."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """A model is loaded."""

    status: Literal["ready"] = "ready"
    model: str = Field(examples=["onethreshold@3"])
    name: str
    version: str
    dim: int
    image_size: int
    note: str | None = Field(None, description="What is wrong all the same, e.g. a registry that is down.")


ALWAYS = (401, 403, 408, 429, 500, 503)
"""Statuses that any route can answer: keys, rates, time-outs and load are looked at before it is reached."""


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """FastAPI's `responses` of a route that answers these errors, and those that any route can answer."""
    return {status: {"model": ErrorAnswer} for status in sorted({*statuses, *ALWAYS})}


def error_response(error: ApiError) -> JSONResponse:
    """The one shape of every error; 429 and 503 say when to try again, 401 how to say who one is."""
    message = error.message.encode("utf-8", "backslashreplace").decode()
    kind = TYPES.get(error.status, "invalid_request_error")
    detail = ErrorDetail(message=message, type=kind, param=error.param, code=error.code)
    headers = {"Retry-After": str(error.retry_after)} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": detail.model_dump()}, error.status, headers=headers)


def image_bytes(text: str, param: str, *, most: int) -> bytes:
    """The bytes of an image given as a data URI or as bare base64, in one line or many.

    Args:
        text: one item of a request's input.
        param: its name in messages, e.g. input[3].
        most: bytes an image may have.

    Raises:
        ApiError: a URL, another media type than an image, no base64, nothing, or more than `most` bytes.
    """
    encoded = text
    if head := re.match(r"\s*([a-zA-Z][a-zA-Z0-9+.-]{0,20}):", text):
        scheme = head.group(1).lower()
        if scheme != "data":
            raise ApiError(
                400,
                f"{param} is a URL ({scheme}:); URLs are not fetched: send the image as data:image/png;base64,...",
                param=param,
                code="url_not_fetched",
            )
        media, comma, encoded = text[head.end() :].partition(",")
        kind, *flags = (part.strip().lower() for part in media[:200].split(";"))
        if not comma or "base64" not in flags:
            raise ApiError(
                400, f"{param} is no base64 data URI; valid: data:image/png;base64,...", param=param, code="not_base64"
            )
        if not kind.startswith("image/"):
            raise ApiError(
                415,
                f"{param} has the media type {kind or 'text/plain'!r}; valid: image/png, image/jpeg, ...",
                param=param,
                code="not_an_image",
            )
    if len(encoded) * 3 // 4 > most + most // 16:  # some room for line breaks, before any work is done
        raise _too_long(param, most)
    try:
        # Only line ends are taken out: words with spaces between would pass as base64 otherwise.
        data = base64.b64decode("".join(encoded.splitlines()).strip(), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            400,
            f"{param} is no base64 (this service embeds images, not text); "
            f"send an image as data:image/png;base64,... or as bare base64",
            param=param,
            code="not_base64",
        ) from error
    return file_bytes(data, param, most=most)


def file_bytes(data: bytes, param: str, *, most: int) -> bytes:
    """The bytes of an image file as they are, if they may be as many.

    Raises:
        ApiError: nothing, or more than `most` bytes.
    """
    if len(data) > most:
        raise _too_long(param, most)
    if not data:
        raise ApiError(400, f"{param} is empty", param=param, code="empty_image")
    return data


def _too_long(param: str, most: int) -> ApiError:
    return ApiError(413, f"{param} is longer than {most:,} bytes", param=param, code="image_too_large")

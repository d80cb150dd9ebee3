"""Request bodies: JSON, multipart/form-data or one raw image, all read into the same validated model."""

from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from dml.names import unknown
from serve.limits import Limits
from serve.schemas import ApiError

Schema = TypeVar("Schema", bound=BaseModel)
TEXT_FIELDS = 100
"""Parts of a form that are no files."""
LONGEST = 16_384
"""Numbers of the longest embedding that a request is expected to hold."""


async def read(
    request: Request, schema: type[Schema], limits: Limits, *, files: Collection[str] = (), image: str | None = None
) -> Schema:
    """The body of a request, whatever its format, as one model.

    A form's text parts fill the fields that they name; its files become bytes. A field that is sent several times
    becomes a list.

    Args:
        request: with a body of any kind.
        schema: what its fields must be. It sees str and numbers of JSON, bytes and str of a form.
        limits: the most images, and bytes an image.
        files: fields that may be files of a form; none: forms are refused.
        image: the field that a raw image/* body fills; None: such bodies are refused.

    Raises:
        ApiError: 400 for what cannot be parsed, 413 for too much, 415 for another kind of body, 422 for fields that
            are missing, unknown or wrong.
    """
    if is_json(request):
        body = await request.body()
        check_values(body, most_values(limits))
        return _validated(schema, body)
    media = media_type(request)
    if files and media == "multipart/form-data":
        return _validated(schema, await _form(request, schema, limits, files))
    if image and media.startswith("image/"):
        return _validated(schema, {image: await request.body()})
    valid = ["application/json", *(["multipart/form-data"] if files else []), *(["image/*"] if image else [])]
    message = f"the Content-Type is {media[:100] or 'not given'}; valid: {', '.join(valid)}"
    raise ApiError(415, message, code="unsupported_media_type")


def media_type(request: Request) -> str:
    """The Content-Type without its parameters, in lower case; empty when there is none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def is_json(request: Request) -> bool:
    """Whether the Content-Type is application/json or one of its kind."""
    media = media_type(request)
    return media.startswith("application/") and media.endswith("json")


def most_values(limits: Limits) -> int:
    """Values that a body of images or of two embeddings may have."""
    return 4 * limits.images + 2 * LONGEST


def check_values(body: bytes, most: int) -> None:
    """Counts the commas of JSON: parsing millions of values would keep a replica from all else for seconds.

    Raises:
        ApiError: 413, more than `most`.
    """
    if (commas := body.count(b",")) > most:
        message = f"the JSON has {commas:,} commas; at most {most:,} values a request are allowed here"
        raise ApiError(413, message, code="too_many_values")


def counted(most: Callable[[], int]) -> type[APIRoute]:
    """Routes whose body is a parameter, which FastAPI parses: they check the values of JSON first, as `read` does."""

    class Counted(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def checked(request: Request) -> Response:
                if is_json(request):
                    check_values(await request.body(), most())
                return await handle(request)

            return checked

    return Counted


def documented(schema: type[BaseModel], *, files: Collection[str] = (), image: str | None = None) -> dict[str, Any]:
    """What a route that calls `read` passes to FastAPI as openapi_extra, so that /docs shows its bodies.

    Args:
        schema: as in `read`; a flat model, without models inside.
        files: as in `read`.
        image: as in `read`.
    """
    shape = schema.model_json_schema()
    content: dict[str, Any] = {"application/json": {"schema": shape}}
    if files:
        binary = {"type": "string", "format": "binary"}
        several = {"type": "array", "items": binary}
        parts = {
            name: (several if name == image else binary) if name in files else field
            for name, field in shape["properties"].items()
        }
        content["multipart/form-data"] = {"schema": {**shape, "properties": parts}}
    if image:
        content["image/*"] = {"schema": {"type": "string", "format": "binary"}}
    return {"requestBody": {"required": True, "content": content}}


def explained(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's errors, as 400 where the body is no JSON, else as 422 with the field's path."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['ctx']['error']}", code="invalid_json")
    path = [part for part in first["loc"] if part != "body"]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".") or None
    message = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(422, f"{param}: {message}" if param else message, param=param, code="invalid_request")


def _validated(schema: type[Schema], body: bytes | dict[str, Any]) -> Schema:
    try:
        return schema.model_validate_json(body) if isinstance(body, bytes) else schema.model_validate(body)
    except ValidationError as error:
        raise explained(error.errors(include_url=False, include_input=False)) from None


class _InMemory(MultiPartParser):
    spool_max_size = 2**31 - 1  # the body lies in memory already: none of it goes to a file


async def _form(request: Request, schema: type[BaseModel], limits: Limits, files: Collection[str]) -> dict[str, Any]:
    parser = _InMemory(
        request.headers,
        request.stream(),
        max_files=limits.images,
        max_fields=TEXT_FIELDS,
        max_part_size=limits.request_bytes,
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            message = f"more than the {limits.images} images that a request may carry"
            raise ApiError(413, message, param=next(iter(files)), code="too_many_images") from None
        raise ApiError(400, f"the body is no multipart/form-data: {error.message}", code="invalid_form") from None
    fields: dict[str, Any] = {}
    for name in form:
        if name not in schema.model_fields:
            raise ApiError(422, unknown("field", name[:100], schema.model_fields), code="invalid_request")
        values = [await _content(name, part, limits, files) for part in form.getlist(name)]
        fields[name] = values if len(values) > 1 else values[0]
    return fields


async def _content(name: str, part: UploadFile | str, limits: Limits, files: Collection[str]) -> bytes | str:
    if isinstance(part, str):
        return part
    if name not in files:
        raise ApiError(422, f"{name} is a file; send it as text", param=name, code="invalid_request")
    return await part.read()

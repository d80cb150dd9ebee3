"""How much one request and one key may ask for, and how much may be under way at once."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Limits(BaseModel):
    """The most that a request, a key and all of them together may ask for."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    images: Count = 64
    """Images a request; 413 beyond."""
    image_bytes: Count = 8 * 2**20
    """Bytes an image, after base64; 413 beyond."""
    request_bytes: Count = 32 * 2**20
    """Bytes of a request's body; 413 beyond."""
    pixels: Count = 40_000_000
    """Width x height of an image, read from its header before any pixel is decoded; 413 beyond."""
    aspect: Count = 100
    """Longer over shorter side of an image: a strip would grow without bound when its short side is resized."""
    requests_per_second: Positive = 500.0
    """By key, with bursts of two seconds' worth; 429 beyond."""
    images_per_second: Positive = 5000.0
    """By key; 429 until what was beyond it is paid off."""
    seconds: Positive = 60.0
    """Until a request is given up: 408 when it has not been sent by then, 503 when it has not been answered."""
    wait_seconds: Positive = 5.0
    """A replica whose images before this request's would take longer answers 503 at once."""
    requests_under_way: Count = 512
    """At each door (Ray Serve's proxy, and each replica); 503 beyond."""
    bytes_under_way: Count = 256 * 2**20
    """Bodies of the requests under way, at each door; 503 beyond."""

"""How much galleries may hold, and one request for them may ask for."""

from pydantic import BaseModel, ConfigDict

from serve.limits import Count


class GalleryLimits(BaseModel):
    """The most of everything; what exceeds it is refused in words."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    galleries: Count = 100
    """Galleries of a service."""
    items: Count = 2_000_000
    """Items of a gallery."""
    items_a_request: Count = 1000
    """Items that one request adds or lists; of images as many as one request may carry anywhere."""
    metadata_bytes: Count = 4096
    """Bytes of an item's metadata as JSON."""
    neighbours: Count = 1000
    """The largest k of a search."""

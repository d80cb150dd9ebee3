"""The requests and answers of galleries in types."""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field

from serve.gallery.info import Info
from serve.gallery.items import check_id, check_metadata
from serve.schemas import ImageOrEmbedding, KnownFields, OperatingPointAnswer

Identifier = Annotated[str, AfterValidator(check_id)]
Metadata = Annotated[dict[str, Any], AfterValidator(check_metadata)]


class GalleryRequest(KnownFields):
    """How a gallery is kept."""

    keep_images: bool | None = None
    """Keep the images that are added, so that a later model can embed them; it cannot be changed. Unset: no."""


class NewItem(KnownFields):
    """One item to add."""

    id: Identifier
    """Its own in the gallery; an item with this id is replaced."""
    input: ImageOrEmbedding
    """A data URI, bare base64, or the numbers of an embedding by the model that is served. URLs are not fetched."""
    metadata: Metadata | None = None
    """Any JSON object, given back with the item."""


class ItemsRequest(KnownFields):
    """Items to add."""

    items: Annotated[list[NewItem], FailFast(), Field(min_length=1)]
    """No two with the same id."""
    model: str | None = None
    """The model that embedded what is given as embeddings; refused unless it is served. Unset, whatever is served."""


class SearchRequest(KnownFields):
    """What to find in which gallery."""

    gallery: str
    """Its name."""
    query: ImageOrEmbedding
    """A data URI, bare base64, or the numbers of an embedding. URLs are not fetched."""
    k: Annotated[int, Field(ge=1)] = 10
    """Neighbours; fewer come where the gallery has fewer."""
    far: float | None = Field(None, examples=[0.01])
    """The false accept rate of one of the model's operating points, which decides what matches."""
    threshold: float | None = None
    """In place of far: a Euclidean distance, 0 to 2."""
    model: str | None = None
    """The model that GET /v1/models lists, with or without its version; unset, whatever is served."""


class SearchAnswer(BaseModel):
    """The nearest items, nearest first."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    object: Literal["search"] = "search"
    data: "list[Neighbour]"
    threshold: float | None
    """A Euclidean distance: what is at it or nearer matches; null for a model without operating points."""
    operating_point: OperatingPointAnswer | None
    """null for a threshold of the request's own."""
    calibration: str | None
    """The id of the calibration in use."""
    gallery: str
    model: str = Field(examples=["onethreshold@3"])


class Neighbour(BaseModel):
    """An item near the query."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    metadata: dict[str, Any] | None
    distance: float
    """Euclidean, between unit vectors: 0 to 2."""
    similarity: float
    """Cosine, -1 to 1: 1 - distance^2 / 2."""
    match: bool | None
    """distance <= threshold; null where there is no threshold."""


class IndexAnswer(BaseModel):
    """How a gallery is searched."""

    model_config = ConfigDict(use_attribute_docstrings=True, from_attributes=True)

    kind: Literal["flat", "gpu", "ivf"]
    """flat and gpu: exactly. ivf: up to 10 neighbours by an inverted file, for large galleries."""
    lists: int
    """Of the inverted file; 0 for an exact search."""
    probes: int
    """Lists that a search looks into."""
    recall: float
    """Share of the 10 nearest items, found by an exact search, that this one finds; 1 when exact."""
    measured_on: int
    """Items whose neighbours it was measured on; 0 when exact."""


class ReembeddingAnswer(BaseModel):
    """How far another model has embedded a gallery's images."""

    model_config = ConfigDict(use_attribute_docstrings=True, from_attributes=True)

    model: str
    """That model."""
    done: int
    """Images that it has embedded."""
    of: int
    """Images in all."""
    trouble: str | None
    """Why it does not go on; null while it does."""


class Gallery(BaseModel):
    """What is known of a gallery."""

    model_config = ConfigDict(use_attribute_docstrings=True, from_attributes=True)

    object: Literal["gallery"] = "gallery"
    name: str
    created: int
    """In seconds since 1970."""
    items: int
    model: str | None
    """The model that embedded its items; null when there are none."""
    dim: int | None
    """D of that model."""
    keep_images: bool
    """Images that are added are kept, so that a later model can embed them."""
    images: int
    """Image files that are kept; items that show the same image share one."""
    without_image: int
    """Items that no other model can embed, since they were given as embeddings."""
    bytes: int
    """On the disk, without images."""
    index: IndexAnswer
    reembedding: ReembeddingAnswer | None

    @classmethod
    def of(cls, info: Info) -> "Gallery":
        """From what the galleries know."""
        return cls.model_validate(info)


class GalleryList(BaseModel):
    """The galleries, by name."""

    object: Literal["list"] = "list"
    data: list[Gallery]


class ListedItem(BaseModel):
    """An item of a gallery."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    object: Literal["item"] = "item"
    id: str
    metadata: dict[str, Any] | None
    image: bool
    """Its image is kept."""


class ItemList(BaseModel):
    """A page of a gallery's items, in the order of their ids."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    object: Literal["list"] = "list"
    data: list[ListedItem]
    after: str | None
    """Where the next page begins, to be given as `after`; null on the last page."""


class Added(BaseModel):
    """Items that are on the disk."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    object: Literal["added"] = "added"
    added: int
    """Items that are new."""
    replaced: int
    """Items that were there with the same id."""
    gallery: str
    model: str = Field(examples=["onethreshold@3"])


class Deleted(BaseModel):
    """What is no longer there."""

    object: Literal["deleted"] = "deleted"
    id: str


def similarity(distance: float) -> float:
    """Cosine similarity of unit vectors at a Euclidean distance."""
    return 1 - math.pow(distance, 2) / 2

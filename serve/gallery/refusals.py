"""What is said to a client whose wish a gallery cannot fulfil."""

from dml.names import unknown
from serve.gallery.store import OtherDimensionError, Store
from serve.schemas import ApiError


def bad_name(name: str) -> ApiError:
    """A name that no gallery can have."""
    message = (
        f"{name[:100]!r} is no name of a gallery; valid: 1 to 63 of a-z, 0-9, '-' and '_', the first a letter or digit"
    )
    return ApiError(422, message, param="gallery", code="bad_gallery_name")


def taken(name: str) -> ApiError:
    """A name under which something else lies among the galleries."""
    message = f"{name!r} is in the galleries' folder already and is no gallery: take another name, or move it away"
    return ApiError(409, message, param="gallery", code="name_taken")


def unknown_gallery(name: str, names: list[str]) -> ApiError:
    """No gallery of this name."""
    hint = unknown("gallery", name[:100], names[:20]) if names else f"unknown gallery {name[:100]!r}; there are none"
    return ApiError(404, f"{hint}; PUT /v1/galleries/NAME makes one", param="gallery", code="gallery_not_found")


def unknown_item(name: str, item: str) -> ApiError:
    """No item of this id."""
    return ApiError(404, f"gallery {name!r} has no item {item[:100]!r}", param="id", code="item_not_found")


def no_image(name: str, item: str) -> ApiError:
    """An item whose image was never kept, or no such item."""
    message = f"gallery {name!r} keeps no image of {item[:100]!r}"
    return ApiError(404, message, param="id", code="image_not_found")


def damaged(name: str) -> ApiError:
    """A gallery whose file cannot be read."""
    message = f"gallery {name!r} cannot be read from the disk; the server's log says why. Restore it, or delete it"
    return ApiError(409, message, param="gallery", code="gallery_damaged")


def disk_failed() -> ApiError:
    """A write that did not reach the disk."""
    return ApiError(
        503, "the disk is full or fails, and nothing was changed; the server's log says more", code="disk_failed"
    )


def unavailable() -> ApiError:
    """Galleries that no process answers for at the moment."""
    message = "the galleries are busy or being restarted; try again: an item that was added already is replaced"
    return ApiError(503, message, code="galleries_unavailable")


def reembedding(name: str, model: str, done: int, of: int) -> ApiError:
    """A gallery that is about to be one of this model."""
    message = f"gallery {name!r} is being embedded by {model}: {done:,} of {of:,} images are done; try again"
    return ApiError(503, message, param="gallery", code="gallery_reembedding")


def other_model(name: str, store: Store, model: str, trouble: str | None) -> ApiError:
    """A gallery of another model than the one that is served: 503 where its images will be embedded anew, else 409."""
    held = store.settings.model
    says = f"gallery {name!r} was embedded by {held}, and {model} is served: distances between them mean nothing."
    if trouble is not None:
        message = f"{says} Embedding its images anew failed: {trouble}"
        return ApiError(409, message, param="gallery", code="gallery_of_another_model")
    missing = store.without_image
    if not missing:
        message = f"{says} Its images are kept and are being embedded anew; try again"
        return ApiError(503, message, param="gallery", code="gallery_reembedding")
    return cannot_reembed(name, says, missing, len(store))


def other_dimension(name: str, error: OtherDimensionError) -> ApiError:
    """A gallery of a model that has the same label and is another: of a folder that was written anew, say."""
    message = f"gallery {name!r}: {error}: they are by different models of one label; rebuild the gallery"
    return ApiError(409, message, param="gallery", code="gallery_of_another_model")


def cannot_reembed(name: str, says: str, missing: int, items: int) -> ApiError:
    """Images that are not there cannot be embedded by another model."""
    message = (
        f"{says} {missing:,} of its {items:,} items have no kept image, so they must be added again: embed the images "
        f"with python -m cluster.embed, then python -m serve.gallery rebuild {name} --from emb.parquet"
    )
    return ApiError(409, message, param="gallery", code="gallery_of_another_model")

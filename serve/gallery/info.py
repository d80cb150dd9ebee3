"""What is known of a gallery."""

from dataclasses import dataclass

from serve.gallery.index import IndexReport
from serve.gallery.staging import Progress, Staging
from serve.gallery.store import Store


@dataclass(frozen=True)
class Info:
    """What is known of a gallery."""

    name: str
    created: int
    """Seconds since 1970."""
    items: int
    model: str | None
    """Label of the model that embedded the items; None when there are none."""
    dim: int | None
    """D of that model."""
    keep_images: bool
    """Images that are added are kept, so that another model can embed them."""
    images: int
    """Image files that are kept; items that show the same image share one."""
    without_image: int
    """Items that no other model can embed, since they were given as embeddings."""
    bytes: int
    """On the disk, without images."""
    index: IndexReport
    """How it is searched."""
    reembedding: Progress | None
    """Another model that embeds its images now."""


def of(name: str, store: Store, staging: Staging | None) -> Info:
    """The present state of a gallery, and of another model's embeddings of it."""
    settings = store.settings
    told = staging is not None and (staging.alive or staging.trouble is not None)
    return Info(
        name=name,
        created=settings.created,
        items=len(store),
        model=settings.model if len(store) else None,
        dim=settings.dim if len(store) else None,
        keep_images=settings.keep_images,
        images=store.kept_images,
        without_image=store.without_image,
        bytes=store.size,
        index=store.index,
        reembedding=staging.progress(store.kept_images) if staging is not None and told else None,
    )

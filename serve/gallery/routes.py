"""POST /v1/search and everything under /v1/galleries."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query, Response

from dml.data.images import media_type
from serve import bodies
from serve import schemas as shared
from serve.calibration import decide
from serve.engine import Engine
from serve.gallery import schemas
from serve.gallery.items import ID_LENGTH, Item, text_of
from serve.gallery.limits import GalleryLimits
from serve.gallery.reembed import Background
from serve.model import Embedder, label
from serve.schemas import ApiError, OperatingPointAnswer, image_bytes

if TYPE_CHECKING:
    from serve.gallery.deployment import Asked

_GALLERY = "/v1/galleries/{name}"
IMAGE_HEADERS = {
    # The file is a client's: a browser must not take it for a page of this service.
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "private, no-cache",
}


def routes(engine: Engine, galleries: "Asked | None", limits: GalleryLimits | None = None) -> APIRouter:
    """The routes.

    Args:
        engine: embeds queries and items.
        galleries: None in a service without: it says so.
        limits: the most that a request may carry; the galleries know how much they may hold.
    """
    if galleries is None:
        return _without()
    limits = limits or GalleryLimits()
    background = Background(engine, galleries)
    router = APIRouter(route_class=bodies.counted(lambda: bodies.most_values(engine.limits)))
    _add_gallery_routes(router, galleries, background, engine)
    items = APIRouter(route_class=bodies.counted(lambda: _most_values(engine, limits)))
    _add_item_routes(items, engine, galleries, limits, background)
    router.include_router(items)

    @router.post("/v1/search", responses=shared.errors(400, 404, 409, 413, 415, 422))
    async def search(wanted: schemas.SearchRequest) -> schemas.SearchAnswer:
        """Finds the nearest items of a gallery."""
        if wanted.k > limits.neighbours:
            message = f"k: {wanted.k} neighbours; at most {limits.neighbours} are allowed"
            raise ApiError(422, message, param="k", code="too_many_neighbours")
        model = engine.model(wanted.model)
        threshold, point = _decided(model, wanted)
        [query_D] = await engine.embed(model, [("query", wanted.query)])
        try:
            found = await galleries.search(wanted.gallery, label(model), query_D, wanted.k)
        except ApiError as error:
            raise _waking(background, wanted.gallery, error) from error
        return schemas.SearchAnswer(
            data=[
                schemas.Neighbour(
                    id=each.id,
                    metadata=_read(each.metadata),
                    distance=each.distance,
                    similarity=schemas.similarity(each.distance),
                    match=None if threshold is None else each.distance <= threshold,
                )
                for each in found
            ],
            threshold=threshold,
            operating_point=None if point is None else OperatingPointAnswer.of(point),
            calibration=model.calibration.id if model.calibration else None,
            gallery=wanted.gallery,
            model=label(model),
        )

    return router


def _add_gallery_routes(router: APIRouter, galleries: "Asked", background: Background, engine: Engine) -> None:
    @router.get("/v1/galleries", responses=shared.errors())
    async def list_galleries() -> schemas.GalleryList:
        """All galleries."""
        return schemas.GalleryList(
            data=[schemas.Gallery.of(await galleries.info(name)) for name in await galleries.names()]
        )

    @router.put(
        _GALLERY,
        responses={201: {"model": schemas.Gallery}, **shared.errors(400, 409, 413, 415, 422)},
    )
    async def create_gallery(
        name: str, response: Response, wanted: schemas.GalleryRequest | None = None
    ) -> schemas.Gallery:
        """Makes a gallery (201), or says that it is there (200)."""
        if await galleries.create(name, wanted.keep_images if wanted else None):
            response.status_code = 201
        return schemas.Gallery.of(await galleries.info(name))

    @router.get(_GALLERY, responses=shared.errors(404, 409))
    async def get_gallery(name: str) -> schemas.Gallery:
        """What is known of a gallery."""
        return schemas.Gallery.of(await galleries.info(name))

    @router.delete(_GALLERY, responses=shared.errors(404))
    async def delete_gallery(name: str) -> schemas.Deleted:
        """Deletes a gallery with its items and images."""
        await galleries.delete(name)
        return schemas.Deleted(id=name)

    @router.post(_GALLERY + "/rebuild", status_code=202, responses=shared.errors(404, 409))
    async def rebuild_gallery(name: str) -> schemas.Gallery:
        """Has the kept images embedded by the model that is served, in the background."""
        model = engine.model()
        if await galleries.claimable(name, label(model)):
            background.wake(name, at_once=True)
        return schemas.Gallery.of(await galleries.info(name))


def _add_item_routes(
    router: APIRouter, engine: Engine, galleries: "Asked", limits: GalleryLimits, background: Background
) -> None:
    @router.post(_GALLERY + "/items", responses=shared.errors(400, 404, 409, 413, 415, 422))
    async def add_items(name: str, wanted: schemas.ItemsRequest) -> schemas.Added:
        """Adds items, or replaces those with the same id; they are on the disk when the answer comes."""
        _check(wanted.items, limits)
        model = engine.model(wanted.model)
        items = await _embedded(engine, model, wanted.items)
        try:
            replaced = await galleries.add(name, label(model), items)
        except ApiError as error:
            raise _waking(background, name, error) from error
        return schemas.Added(added=len(items) - replaced, replaced=replaced, gallery=name, model=label(model))

    @router.get(_GALLERY + "/items", responses=shared.errors(404, 409, 422))
    async def list_items(
        name: str,
        after: Annotated[str, Query(max_length=ID_LENGTH)] = "",
        limit: Annotated[int, Query(ge=1, le=limits.items_a_request)] = 100,
    ) -> schemas.ItemList:
        """A page of the items, in the order of their ids."""
        found = await galleries.page(name, after, limit)
        return schemas.ItemList(
            data=[schemas.ListedItem(id=each.id, metadata=_read(each.metadata), image=each.image) for each in found],
            after=found[-1].id if len(found) == limit else None,
        )

    # An id may hold slashes: many are paths.
    @router.get(
        _GALLERY + "/items/{item:path}/image",
        response_class=Response,
        responses={
            200: {"content": {"image/*": {"schema": {"type": "string", "format": "binary"}}}},
            **shared.errors(404, 409),
        },
    )
    async def get_item_image(name: str, item: str) -> Response:
        """The image file of an item, where images are kept."""
        data = await galleries.image(name, item)
        [media] = await engine.in_threads(media_type, [data])
        return Response(data, media_type=media, headers=IMAGE_HEADERS)

    @router.delete(_GALLERY + "/items/{item:path}", responses=shared.errors(404, 409))
    async def delete_item(name: str, item: str) -> schemas.Deleted:
        """Takes an item out."""
        await galleries.remove(name, item)
        return schemas.Deleted(id=item)


async def _embedded(engine: Engine, model: Embedder, wanted: Sequence[schemas.NewItem]) -> list[Item]:
    files = [
        image_bytes(each.input, f"items[{place}].input", most=engine.limits.image_bytes)
        if isinstance(each.input, str)
        else None
        for place, each in enumerate(wanted)
    ]
    inputs = [
        (f"items[{place}].input", each.input if file is None else file)
        for place, (each, file) in enumerate(zip(wanted, files, strict=True))
    ]
    rows = await engine.embed(model, inputs)
    return [
        Item(each.id, row, None if each.metadata is None else text_of(each.metadata), file)
        for each, row, file in zip(wanted, rows, files, strict=True)
    ]


def _most_values(engine: Engine, limits: GalleryLimits) -> int:
    # Items of embeddings, with metadata of 32 bytes a value in the mean.
    return bodies.most_values(engine.limits) + limits.items_a_request * (
        engine.model().dim + limits.metadata_bytes // 32
    )


def _check(items: Sequence[schemas.NewItem], limits: GalleryLimits) -> None:
    if len(items) > limits.items_a_request:
        message = f"{len(items)} items; at most {limits.items_a_request} a request are allowed"
        raise ApiError(413, message, param="items", code="too_many_items")
    name, count = Counter(item.id for item in items).most_common(1)[0]
    if count > 1:
        message = f"the id {name[:100]!r} comes {count} times; an id may come once a request"
        raise ApiError(422, message, param="items", code="id_twice")
    for place, item in enumerate(items):
        if item.metadata is not None and len(text_of(item.metadata).encode()) > limits.metadata_bytes:
            message = f"items[{place}].metadata is longer than {limits.metadata_bytes:,} bytes of JSON"
            raise ApiError(413, message, param=f"items[{place}].metadata", code="metadata_too_large")


def _decided(model: Embedder, wanted: schemas.SearchRequest) -> tuple[float | None, Any]:
    """As `decide`; without operating points a search that asks for none finds without deciding."""
    if model.calibration is None and wanted.far is None and wanted.threshold is None:
        return None, None
    return decide(model, wanted.far, wanted.threshold)


def _waking(background: Background, name: str, error: ApiError) -> ApiError:
    if error.code == "gallery_reembedding":
        background.wake(name)
    return error


def _read(metadata: str | None) -> dict[str, Any] | None:
    read: dict[str, Any] | None = None if metadata is None else json.loads(metadata)
    return read


def _without() -> APIRouter:
    """Answers in words in a service without galleries."""
    router = APIRouter(include_in_schema=False)

    async def absent() -> None:
        message = "this service has no galleries: python -m serve.app --galleries DIR starts one that has"
        raise ApiError(404, message, code="no_galleries")

    methods = ["GET", "PUT", "POST", "DELETE"]
    router.add_api_route("/v1/search", absent, methods=["POST"])
    router.add_api_route("/v1/galleries", absent, methods=["GET"])
    router.add_api_route("/v1/galleries/{rest:path}", absent, methods=methods)
    return router

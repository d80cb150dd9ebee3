"""The HTTP API as a FastAPI app; what it serves comes from a `Source`, so the same app runs with any model."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from serve import bodies, drift, embeddings, models, page, schemas, verification
from serve.engine import Engine
from serve.gallery import routes as gallery_routes
from serve.gallery.limits import GalleryLimits
from serve.gate import Gate
from serve.keys import Keys
from serve.limits import Limits
from serve.model import Source, label
from serve.schemas import ApiError

if TYPE_CHECKING:
    from serve.gallery.deployment import Asked


def build(
    source: Source,
    limits: Limits | None = None,
    *,
    threads: int | None = None,
    keys: Keys | None = None,
    galleries: "Asked | None" = None,
    gallery_limits: GalleryLimits | None = None,
) -> FastAPI:
    """The app: /v1/embeddings, /v1/verify, /v1/models, ..., /healthz, /readyz, /docs, and the page at /.

    Args:
        source: where each request finds the model; started and stopped with the app.
        limits: the most that a request, a key and all together may ask for.
        threads: that decode images, beside the one that runs the model.
        keys: the API keys, one of which every request must bring; without any in it only this machine is served.
            None: whoever asks is.
        galleries: that are searched; None for a service without.
        gallery_limits: the most that a request may ask of them.
    """
    engine = Engine(source, limits, threads=threads)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            engine.stop()

    # The gate asks for the key; this is what /docs and generated clients know of it.
    bearer = HTTPBearer(auto_error=False, description="An API key; not needed where the service has none.")
    # FastAPI's own /docs loads its JavaScript from a CDN, which a cluster may not reach.
    app = FastAPIOffline(
        title="OneThreshold",
        summary="Image embeddings with one threshold.",
        redoc_url=None,
        static_url="/docs/files",
        favicon_url="/page/icon.svg",
        lifespan=lifespan,
        dependencies=[Security(bearer)],
    )
    app.state.engine = engine
    app.add_middleware(Gate, limits=engine.limits, known=keys)
    _speak_in_one_shape(app)

    @app.get("/healthz", tags=["probes"])
    async def healthz() -> schemas.Health:
        """The process lives."""
        return schemas.Health()

    @app.get("/readyz", tags=["probes"], responses=schemas.errors())
    async def readyz() -> schemas.Ready:
        """A model is loaded."""
        model = engine.model()
        return schemas.Ready(
            model=label(model),
            name=model.name,
            version=model.version,
            dim=model.dim,
            image_size=model.image_size,
            note=source.trouble,
        )

    app.include_router(embeddings.routes(engine), tags=["embeddings"])
    app.include_router(verification.routes(engine), tags=["same or not"])
    app.include_router(gallery_routes.routes(engine, galleries, gallery_limits), tags=["galleries"])
    app.include_router(models.routes(engine), tags=["the model"])
    app.include_router(drift.routes(engine), tags=["the model"])
    app.include_router(page.routes())
    return app


def _speak_in_one_shape(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return schemas.error_response(error)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return schemas.error_response(ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        refused = bodies.explained(error.errors())
        media = bodies.media_type(request)
        if error.errors()[0]["loc"][:1] == ("body",) and not (
            media.startswith("application/") and media.endswith("json")
        ):
            # FastAPI takes what is not said to be JSON for a string, and then misses the fields.
            message = f"the Content-Type is {media[:100] or 'not given'}; valid: application/json"
            refused = ApiError(415, message, code="unsupported_media_type")
        return schemas.error_response(refused)

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> Response:
        return schemas.error_response(ApiError(500, "the server failed; its log says why"))

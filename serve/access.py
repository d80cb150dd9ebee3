"""What is known of a request: a line in the log, and the service's metrics. No image data and no secret."""

import functools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import ray
from ray.util.metrics import Counter, Gauge, Histogram

log = logging.getLogger("ray.serve.access")  # below Serve's own logger, whose handlers write to its files
_MILLISECONDS = [5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 30000.0, 60000.0]
_IMAGES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]


@dataclass
class Record:
    """One request, filled in as it is handled.

    Attributes:
        method: of HTTP.
        path: as the client wrote it, without the query.
        key: the name of its key; empty without one.
        model: label of the model that answered; empty when none did.
        images: that it carried.
        bytes: of its body.
        status: of its answer; 499 when the client left first.
        code: of an error that the service, not a route, answered.
    """

    method: str
    path: str
    key: str = ""
    model: str = ""
    images: int = 0
    bytes: int = 0
    status: int = 499
    code: str = ""
    route: str = "other"
    started: float = field(default_factory=time.perf_counter)

    def line(self) -> str:
        """One line, whatever the path holds."""
        spent = (time.perf_counter() - self.started) * 1000
        code = f" {self.code}" if self.code else ""
        return (
            f"{self.method} {ascii(self.path[:200])[1:-1]} {self.status}{code} {spent:.1f} ms "
            f"{self.images} images {self.bytes} bytes key={self.key or '-'} model={self.model or '-'}"
        )


current: ContextVar[Record | None] = ContextVar("request", default=None)


def saw(model: str, images: int) -> None:
    """Notes what the present request asked of a model; does nothing outside a request."""
    if (record := current.get()) is not None:
        record.model = model
        record.images += images


@contextmanager
def noted(record: Record, *, all_answers: bool) -> Iterator[None]:
    """Makes it the present request, and logs and counts it at the end.

    Args:
        record: the request.
        all_answers: False at a door that passes answers on, whose author notes them: then only errors of its own.
    """
    token = current.set(record)
    try:
        yield
    finally:
        current.reset(token)
        if all_answers or record.code:
            log.info(record.line())
            count(record)


def count(record: Record) -> None:
    """Adds a request to the metrics."""
    if not ray.is_initialized():
        return
    metrics = _metrics()
    metrics.requests.inc(1, {"route": record.route, "status": str(record.status)})
    metrics.milliseconds.observe((time.perf_counter() - record.started) * 1000, {"route": record.route})
    if record.images:
        metrics.images.inc(record.images)
    if record.code:
        metrics.rejections.inc(1, {"code": record.code})


def count_batch(images: int) -> None:
    """Adds a forward pass to the metrics."""
    if ray.is_initialized():
        _metrics().batches.observe(images)


def count_model(label: str, served: bool) -> None:
    """Notes that a model is served now, or no longer."""
    if ray.is_initialized():
        _metrics().model.set(float(served), {"model": label})


class _Metrics:
    def __init__(self) -> None:
        self.requests = Counter("onethreshold_requests", "Requests by route and status.", ("route", "status"))
        self.images = Counter("onethreshold_images", "Images of requests.")
        self.milliseconds = Histogram(
            "onethreshold_request_ms", "Milliseconds from request to answer.", _MILLISECONDS, ("route",)
        )
        self.batches = Histogram("onethreshold_batch_images", "Images of a forward pass.", _IMAGES)
        self.rejections = Counter("onethreshold_rejections", "Requests refused before any route.", ("code",))
        self.model = Gauge("onethreshold_model", "1 for the model that is served, 0 for those before.", ("model",))


@functools.cache
def _metrics() -> _Metrics:
    return _Metrics()

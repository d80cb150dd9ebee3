"""The Ray Serve deployment that holds all galleries, and how the replicas of the API ask it."""

import functools
import logging
import math
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import ray
import ray.serve
from ray.serve.exceptions import RayServeException

from serve.gallery import refusals
from serve.gallery.galleries import Galleries
from serve.gallery.limits import GalleryLimits
from serve.gallery.lock import WrittenElsewhereError
from serve.gallery.store import Found
from serve.schemas import ApiError

log = logging.getLogger(__name__)

NAME = "Galleries"
"""Of the deployment."""
ONGOING, QUEUED = 256, 1024
"""Requests that it takes at once, since additions wait for the disk together, and that wait for it."""
FEW = 100
"""Neighbours whose ids and metadata surely fit into a message of 4 MiB."""

Row = npt.NDArray[np.float32]
Given = ParamSpec("Given")
Result = TypeVar("Result")
Method = Callable[Concatenate[Galleries, Given], Coroutine[Any, Any, Result]]


@dataclass(frozen=True)
class Refusal:
    """An ApiError as a value: Serve logs what a replica raises, trace and all."""

    status: int
    message: str
    param: str | None
    code: str | None


def _answered(
    method: Method[Given, Result],
) -> Callable[Concatenate["Replica", Given], Coroutine[Any, Any, Result | Refusal]]:
    async def answered(self: "Replica", /, *given: Given.args, **named: Given.kwargs) -> Result | Refusal:
        try:
            if self.galleries is None:
                raise refusals.unavailable()
            return await method(self.galleries, *given, **named)
        except ApiError as error:
            return Refusal(error.status, error.message, error.param, error.code)

    return answered


def _asked(
    method: Method[Given, Result], *, directly: bool = False
) -> Callable[Concatenate["Remote", Given], Coroutine[Any, Any, Result]]:
    async def asked(self: "Remote", /, *given: Given.args, **named: Given.kwargs) -> Result:
        answer: Result | Refusal
        try:
            answer = await getattr(self.handle(directly=directly), method.__name__).remote(*given, **named)
        except ray.exceptions.RayTaskError:
            raise  # a bug, which the replica's log shows
        except (ray.exceptions.RayError, RayServeException) as error:
            raise refusals.unavailable() from error
        if isinstance(answer, Refusal):
            raise ApiError(answer.status, answer.message, param=answer.param, code=answer.code)
        return answer

    return asked


class Replica:
    """The galleries under a folder; one replica, since one process writes.

    While another process has the folder, it refuses with 503: an old cluster goes only when the new one is up.

    Args:
        folder: absolute; on a volume that the replica's node sees.
        limits: the most of everything.
        threads: that search, and build indices.
    """

    def __init__(self, folder: str, limits: GalleryLimits, threads: int) -> None:
        self._open = functools.partial(Galleries, Path(folder), limits, threads=threads)
        self._failed: Exception | None = None
        self.galleries: Galleries | None = None
        try:
            self.galleries = self._open()
        except WrittenElsewhereError as error:
            log.warning("the galleries answer 503 until they are free: %s", error)
            threading.Thread(target=self._take_over, name="take-over", daemon=True).start()

    def check_health(self) -> None:
        """Raises what kept the galleries from being taken over: then Serve starts another replica."""
        if self._failed is not None:
            raise self._failed

    def _take_over(self) -> None:
        try:
            self.galleries = self._open(patience=math.inf)
        except Exception as error:
            self._failed = error

    names = _answered(Galleries.names)
    create = _answered(Galleries.create)
    info = _answered(Galleries.info)
    delete = _answered(Galleries.delete)
    add = _answered(Galleries.add)
    remove = _answered(Galleries.remove)
    page = _answered(Galleries.page)
    image = _answered(Galleries.image)
    search = _answered(Galleries.search)
    claim = _answered(Galleries.claim)
    claimable = _answered(Galleries.claimable)
    images = _answered(Galleries.images)
    stage = _answered(Galleries.stage)
    finish = _answered(Galleries.finish)
    give_up = _answered(Galleries.give_up)


class Remote:
    """The galleries as a replica of the API asks for them: the methods of `Galleries`, over Ray.

    Args:
        application: the Serve application that the deployment belongs to.
    """

    def __init__(self, application: str) -> None:
        self._application = application
        self._handles: tuple[Any, Any] | None = None

    def handle(self, *, directly: bool = False) -> Any:
        """The deployment's handle; directly is without Ray's object store, in half the time, for up to 4 MiB.

        It is looked up when it is first needed: where the app is built there may be no Serve yet.
        """
        if self._handles is None:
            found = ray.serve.get_deployment_handle(NAME, app_name=self._application)
            self._handles = found, found.options(_by_reference=False)
        return self._handles[directly]

    async def search(self, name: str, model: str, query_D: Row, k: int) -> list[Found]:
        """As that of `Galleries`."""
        return await (self._search_directly if k <= FEW else self._search)(name, model, query_D, k)

    names = _asked(Galleries.names)
    create = _asked(Galleries.create)
    info = _asked(Galleries.info)
    delete = _asked(Galleries.delete)
    add = _asked(Galleries.add)
    remove = _asked(Galleries.remove)
    page = _asked(Galleries.page)
    image = _asked(Galleries.image)
    _search = _asked(Galleries.search)
    _search_directly = _asked(Galleries.search, directly=True)
    claim = _asked(Galleries.claim)
    claimable = _asked(Galleries.claimable)
    images = _asked(Galleries.images)
    stage = _asked(Galleries.stage)
    finish = _asked(Galleries.finish)
    give_up = _asked(Galleries.give_up)


Asked = Galleries | Remote
"""What the routes ask."""


def deployment(folder: str, limits: GalleryLimits, *, threads: int, gpus: float = 0.0) -> ray.serve.Application:
    """The deployment, bound; to be handed to the application's ingress.

    Args:
        folder: of the galleries, absolute.
        limits: the most of everything.
        threads: that search, and build indices.
        gpus: that rows are searched on, if faiss can; 0 for none.
    """
    made: Any = ray.serve.deployment(
        name=NAME,
        num_replicas=1,
        max_ongoing_requests=ONGOING,
        max_queued_requests=QUEUED,
        # No CPU of its own: it needs memory, and is to fit beside the model on a laptop.
        ray_actor_options={"num_cpus": 0, "num_gpus": gpus},
        logging_config={"enable_access_log": False},  # that of the API says who asked what
    )(Replica)
    bound: ray.serve.Application = made.bind(folder, limits, threads)
    return bound

"""Serves the champion over HTTP with Ray Serve: `python -m serve.app`, or `serve.app:build` in a Serve config file."""

import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pydantic
import ray
import ray.serve
import ray.serve.config
from fastapi import FastAPI
from ray.serve.exceptions import RayServeException

from cluster import command_line, registry, session, tracking
from cluster.command_line import one_line_errors
from dml.names import unknown
from serve import api, gate, model
from serve.gallery import deployment as gallery
from serve.gallery.limits import GalleryLimits
from serve.gallery.lock import FolderLock
from serve.keys import Keys, is_loopback
from serve.limits import Limits

NAME = "onethreshold"
ONGOING = 64
"""Requests in a replica: enough to fill a batch with those of one image. What waits too long there is refused."""
TARGET = 16
"""Requests a replica that autoscaling aims at: enough to decode beside the forward pass."""
SWITCH = 0.0005
"""Seconds after which a thread of a replica lets another that waits run Python; the interpreter's 5 ms would hold the
model's thread up between two layers, whenever a request comes or goes."""
QUEUED = 64
"""Requests that wait at the proxy for a replica to take them; 503 beyond."""


@dataclass(frozen=True)
class Options:
    """Serves image embeddings over HTTP (POST /v1/embeddings, GET /healthz, /readyz, /v1/models, /docs).

    Joins the Ray cluster at RAY_ADDRESS, or starts a local Ray. Without a champion it answers 503 until one is
    promoted; it follows the alias from then on. Ctrl-C ends it.
    """

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in, which needs API keys."""
    port: int = 8000
    """Port to listen on."""
    model: str = f"models:/{registry.NAME}@{registry.ALIAS}"
    """models:/NAME@ALIAS (followed when it moves), models:/NAME/VERSION, or the path of a checkpoint folder."""
    keys: str = ""
    """File of API keys, lines of python -m serve.keys new NAME; unset, those in ONETHRESHOLD_KEYS."""
    poll: float = 5.0
    """Seconds between two looks at the registry."""
    replicas: str = "1"
    """How many replicas, or MIN:MAX, e.g. 1:4, by the requests under way."""
    cpus: float = 1.0
    """CPUs of a replica; also its threads."""
    gpus: float | None = None
    """GPUs of a replica, e.g. 0.25; unset, one when the cluster has any."""
    batch: int | None = None
    """Images of one forward pass; unset, measured when a model is loaded."""
    compile: bool = False
    """Compile the model with torch.compile: a minute or more at each change of model; needs a compiler."""
    limits: Limits = field(default_factory=Limits)
    """What a request, a key and all together may ask for."""
    galleries: str | None = None
    """Folder of the galleries, on a volume that their replica sees; '' for none. Unset, runs/galleries where this
    command starts Ray itself, else none."""
    gallery_gpus: float = 0.0
    """GPUs that galleries are searched on, where faiss-gpu is installed."""
    gallery_limits: GalleryLimits = field(default_factory=GalleryLimits)
    """How much galleries may hold."""

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"


class Embeddings:
    """The deployment: the API, and whether a replica of it is well."""

    app: Any

    def __init__(self, *beside: object) -> None:
        # Bound to this one so that Serve starts them too; the app finds them by name.
        self.beside = beside

    def check_health(self) -> None:
        """Asked by Ray Serve every few seconds; raises when the replica must be replaced."""
        self.app.state.engine.check()


def build(args: Mapping[str, Any]) -> ray.serve.Application:
    """The application for Serve config files (`serve deploy`, RayService), `serve.app:build` as its import_path.

    Args:
        args: `Options` by name, as on the command line: {"model": "models:/shop@champion", "limits": {"images": 16}}.
            host and port are Serve's there, in http_options.

    Raises:
        ValueError: an option that there is not, or a value that is refused.
    """
    fields = Options.__dataclass_fields__
    for name in args:
        if name not in fields:
            raise ValueError(unknown("option", name, fields))
    try:
        options = pydantic.TypeAdapter(Options).validate_python(dict(args))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']} (got {first['input']!r})") from None
    return deployment(options)


def deployment(options: Options) -> ray.serve.Application:
    """The Ray Serve application.

    Raises:
        ValueError: as in `check`.
    """
    check(options)
    limits, keys, poll, threads = options.limits, Keys.find(_keys(options)), options.poll, max(1, int(options.cpus))
    wanted = options.model if options.model.startswith("models:") else str(Path(options.model).absolute())
    batch, compiled = options.batch, options.compile
    beside, gallery_limits = _galleries(options), options.gallery_limits
    has_galleries = bool(beside)

    def app() -> FastAPI:
        sys.setswitchinterval(SWITCH)
        source = model.source(wanted, poll, model.Execution(session.use_device(), batch, compiled))
        # Before it is given requests: a replica beside others must not answer that there is no model yet.
        source.look()
        galleries = gallery.Remote(ray.serve.get_replica_context().app_name) if has_galleries else None
        return api.build(source, limits, threads=threads, keys=keys, galleries=galleries, gallery_limits=gallery_limits)

    resources = {"num_cpus": options.cpus, "num_gpus": _gpus(options)}
    deployed: Any = ray.serve.deployment(
        name="Embeddings",
        max_ongoing_requests=ONGOING,
        max_queued_requests=QUEUED,
        ray_actor_options={**resources, "runtime_env": {"env_vars": _environment()}},
        logging_config={"enable_access_log": False},  # it has one of its own
        **_scale(options.replicas),
    )(ray.serve.ingress(app)(Embeddings))
    bound: ray.serve.Application = deployed.bind(*beside)
    return bound


def check(options: Options) -> None:
    """Refuses, before anything is started, what can never be served.

    Raises:
        ValueError: the field, its value and what would be valid; or a host beyond this machine without API keys.
    """
    model.check(options.model)
    for name, value in (("poll", options.poll), ("cpus", options.cpus), ("batch", options.batch)):
        if value is not None and not value > 0:
            raise ValueError(f"{name}: {value:g} must be above 0")
    if options.gpus is not None and not options.gpus >= 0:
        raise ValueError(f"gpus: {options.gpus:g} must not be below 0")
    if not 1 <= options.port <= 65535:
        raise ValueError(f"port: {options.port} is no port; valid: 1 to 65535")
    _scale(options.replicas)
    keys = Keys.find(_keys(options))
    if not keys.hashes and not is_loopback(options.host):
        raise ValueError(
            f"host: {options.host} lets other machines in, and there are no API keys: python -m serve.keys new NAME "
            "makes one, for --keys FILE or ONETHRESHOLD_KEYS; without keys only 127.0.0.1 is listened on"
        )


def start(options: Options) -> str:
    """Deploys on the connected Ray and returns the service's URL.

    Raises:
        ValueError: as in `check`, or the cluster, as it is now, can never hold a replica, or a Ray of this machine
            alone the fewest replicas that are wanted.
        RuntimeError: the deployment does not start.
    """
    application = deployment(options)
    _check_room(options)
    ray.serve.start(
        proxy_location="HeadOnly",
        http_options=ray.serve.config.HTTPOptions(
            host=options.host,
            port=options.port,
            request_timeout_s=options.limits.seconds + 5,  # the gate's comes first, where there is one
        ),
    )
    ray.serve.run(application, name=NAME, route_prefix="/")
    return options.url


def main(argv: Sequence[str] | None = None) -> None:
    """Deploys, prints what is served and how to try it, and blocks until Ctrl-C or SIGTERM."""
    options = command_line.read(Options, sys.argv[1:] if argv is None else argv)
    with one_line_errors(status=2):
        check(options)
        if not os.environ.get("RAY_ADDRESS"):  # else the port is one of another machine, and so is the volume
            _check_port(options)
            if options.galleries is None:
                options = replace(options, galleries=str(tracking.runs_dir() / "galleries"))
            if options.galleries:
                _check_folder(Path(options.galleries))  # else its replica would find out, and wait
            os.environ.update(gate.environment(options.limits, Keys.find(_keys(options))))
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        session.connect()
        for number in (signal.SIGINT, signal.SIGTERM):  # after Ray set a handler of its own
            signal.signal(number, signal.default_int_handler)
        print(_awaited(options), flush=True)
        with one_line_errors(status=2):
            url = start(options)
        print(_greeting(url, options), flush=True)
        while True:
            signal.pause()
    except KeyboardInterrupt:
        print("stopping", flush=True)
        # Only the application: a cluster that others use keeps its Serve, a local Ray ends with all its processes.
        if ray.is_initialized():
            with suppress(RayServeException):  # Serve was not even started
                ray.serve.delete(NAME)
    finally:
        ray.shutdown()


def _counts(replicas: str) -> tuple[int, int]:
    """The fewest replicas and the most, of a number or MIN:MAX."""
    found = re.fullmatch(r"(\d+)(?::(\d+))?", replicas)
    if not found or int(found[1]) < 1 or (found[2] and int(found[2]) < int(found[1])):
        raise ValueError(f"replicas: {replicas!r} is neither a number from 1, such as 2, nor MIN:MAX, such as 1:4")
    return int(found[1]), int(found[2] or found[1])


def _scale(replicas: str) -> dict[str, Any]:
    """Serve's words for so many."""
    least, most = _counts(replicas)
    if least == most:
        return {"num_replicas": least}
    return {
        "autoscaling_config": {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": TARGET},
    }


def _galleries(options: Options) -> list[ray.serve.Application]:
    """The deployment of the galleries, if there are any."""
    if not options.galleries:
        return []
    folder, threads = str(Path(options.galleries).absolute()), max(1, int(options.cpus))
    return [gallery.deployment(folder, options.gallery_limits, threads=threads, gpus=options.gallery_gpus)]


def _keys(options: Options) -> Path | None:
    return Path(options.keys) if options.keys else None


def _gpus(options: Options) -> float:
    if options.gpus is not None:
        return options.gpus
    return min(1.0, ray.cluster_resources().get("GPU", 0.0)) if ray.is_initialized() else 0.0


def _environment() -> dict[str, str]:
    """What a replica is told through its environment: it may run on another node, in another folder."""
    kept = {key: os.environ[key] for key in ("ONETHRESHOLD_CACHE",) if key in os.environ}
    # MLflow's own seven retries of two minutes would hold the search for a champion for as long.
    impatient = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    return {"MLFLOW_TRACKING_URI": tracking.connect(), **impatient, **kept}


def _check_room(options: Options) -> None:
    total: dict[str, float] = ray.cluster_resources()
    gpus, gallery_gpus = _gpus(options), options.gallery_gpus if options.galleries else 0.0
    alone = (("cpus", "CPU", options.cpus), ("gpus", "GPU", gpus), ("gallery_gpus", "GPU", gallery_gpus))
    for option, kind, needed in alone:
        if needed > total.get(kind, 0.0):
            raise ValueError(f"{option}: {needed:g} is more than the cluster has ({total.get(kind, 0.0):g} {kind})")
    if os.environ.get("RAY_ADDRESS"):
        return  # a cluster may grow
    least = _counts(options.replicas)[0]
    for kind, each, beside in (("CPU", options.cpus, 0.0), ("GPU", gpus, gallery_gpus)):
        needed, has = least * each + beside, total.get(kind, 0.0)
        if needed > has:
            galleries = f" and {beside:g} for the galleries" if beside else ""
            asked = f"{least} with {each:g} {kind} each{galleries}"
            raise ValueError(f"replicas: {asked} need {needed:g} {kind}; this machine has {has:g}")


def _awaited(options: Options) -> str:
    """What a start waits for, which takes as long as others use the cluster."""
    free: dict[str, float] = ray.available_resources()
    each = {"CPU": options.cpus, "GPU": _gpus(options)}
    wanted, there = (
        ", ".join(f"{found.get(kind, 0.0):g} {kind}" for kind, needed in each.items() if needed)
        for found in (each, free)
    )
    return f"starting replicas: {_counts(options.replicas)[0]} with {wanted} each; free now: {there}"


def _check_folder(galleries: Path) -> None:
    try:
        FolderLock(galleries).release()
    except OSError as error:
        raise ValueError(f"galleries: {galleries}: {error.strerror}; a folder that can be written is needed") from error


def _check_port(options: Options) -> None:
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            raise ValueError(f"cannot listen on {options.url}: {error.strerror}; --port takes another") from error


def _greeting(url: str, options: Options) -> str:
    image = '\'{"input": "data:image/png;base64,\'"$(base64 -w0 image.png)"\'"}\''
    key = " -H 'Authorization: Bearer KEY'" if Keys.find(_keys(options)).hashes else ""
    return "\n".join(
        [
            f"serving {options.model} at {url}",
            f"  ready?  curl {url}/readyz",
            f"  try it  curl {url}/v1/embeddings{key} -H 'Content-Type: application/json' -d {image}",
            f"  the API {url}/docs",
            "Ctrl-C ends it",
        ]
    )


if __name__ == "__main__":
    # From its full name, so that what travels to the replica is found there too.
    from serve.app import main as run

    run()

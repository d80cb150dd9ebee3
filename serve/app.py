"""Serves the champion over HTTP with Ray Serve: `python -m serve.app`."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.serve
import ray.serve.config
import tyro
from fastapi import FastAPI

from cluster import registry, session, tracking
from cluster.command_line import one_line_errors
from serve import api, model
from serve.limits import Limits

NAME = "onethreshold"
REQUEST_TIMEOUT_S = 60.0
# Ongoing: enough to decode beside the forward pass. Queued: more would wait longer than clients do.
ONGOING, QUEUED = 16, 128


@dataclass(frozen=True)
class Options:
    """Serves image embeddings over HTTP (POST /v1/embeddings, GET /healthz, /readyz, /v1/models, /docs).

    Joins the Ray cluster at RAY_ADDRESS, or starts a local Ray. Without a champion it answers 503 until one is
    promoted; it follows the alias from then on. Ctrl-C ends it.
    """

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in (there are no API keys)."""
    port: int = 8000
    """Port to listen on."""
    model: str = f"models:/{registry.NAME}@{registry.ALIAS}"
    """models:/NAME@ALIAS (followed when it moves), models:/NAME/VERSION, or the path of a checkpoint folder."""
    poll: float = 5.0
    """Seconds between two looks at the registry."""
    cpus: float = 1.0
    """CPUs of the replica; also its threads."""
    gpus: float | None = None
    """GPUs of the replica, e.g. 0.25; unset, one when the cluster has any."""
    limits: Limits = field(default_factory=Limits)
    """The most that a request may carry."""


def deployment(options: Options) -> ray.serve.Application:
    """The Ray Serve application; needs a connected Ray.

    Raises:
        ValueError: `model` is neither a models: URI nor a usable checkpoint folder, or the cluster, as it is now, can
            never hold the replica.
    """
    check(options)
    total: dict[str, float] = ray.cluster_resources()
    gpus = options.gpus if options.gpus is not None else min(1.0, total.get("GPU", 0.0))
    for option, kind, wanted_of in (("cpus", "CPU", options.cpus), ("gpus", "GPU", gpus)):
        if wanted_of > total.get(kind, 0.0):
            raise ValueError(f"{option}: {wanted_of:g} is more than the cluster has ({total.get(kind, 0.0):g} {kind})")
    limits, poll, threads = options.limits, options.poll, max(1, int(options.cpus))
    wanted = options.model if options.model.startswith("models:") else str(Path(options.model).absolute())

    def app() -> FastAPI:
        source = model.source(wanted, poll, device=session.use_device())
        return api.build(source, limits, threads=threads)

    deployed: Any = ray.serve.deployment(
        name="Embeddings",
        max_ongoing_requests=ONGOING,
        max_queued_requests=QUEUED,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": gpus, "runtime_env": {"env_vars": _environment()}},
    )(ray.serve.ingress(app)())
    bound: ray.serve.Application = deployed.bind()
    return bound


def check(options: Options) -> None:
    """Refuses, before anything is started, what can never be served.

    Raises:
        ValueError: the field, its value and what would be valid.
    """
    model.check(options.model)
    for name, value in (("poll", options.poll), ("cpus", options.cpus)):
        if not value > 0:
            raise ValueError(f"{name}: {value:g} must be above 0")


def start(options: Options) -> str:
    """Deploys on the connected Ray and returns the service's URL.

    Raises:
        ValueError: as in `deployment`.
        RuntimeError: the deployment does not start.
    """
    application = deployment(options)
    ray.serve.start(
        proxy_location="HeadOnly",
        http_options=ray.serve.config.HTTPOptions(
            host=options.host, port=options.port, request_timeout_s=REQUEST_TIMEOUT_S
        ),
    )
    ray.serve.run(application, name=NAME, route_prefix="/")
    return f"http://{options.host}:{options.port}"


def main(argv: Sequence[str] | None = None) -> None:
    """Deploys, prints what is served and how to try it, and blocks until Ctrl-C or SIGTERM."""
    options = tyro.cli(Options, args=argv, prog="python -m serve.app")
    with one_line_errors(status=2):
        check(options)
        if not os.environ.get("RAY_ADDRESS"):  # else the port is one of another machine
            _check_port(options.host, options.port)
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    session.connect()
    try:
        with one_line_errors(status=2):
            url = start(options)
        print(_greeting(url, options.model), flush=True)
        while not stopping.wait(0.5):
            pass
        print("stopping", flush=True)
        # Only the application: a cluster that others use keeps its Serve, a local Ray ends with all its processes.
        ray.serve.delete(NAME)
    finally:
        ray.shutdown()


def _environment() -> dict[str, str]:
    """What a replica is told through its environment: it may run on another node, in another folder."""
    kept = {key: os.environ[key] for key in ("ONETHRESHOLD_CACHE",) if key in os.environ}
    # MLflow's own seven retries would hold the search for a champion for minutes.
    return {"MLFLOW_TRACKING_URI": tracking.connect(), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", **kept}


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}; --port takes another") from error


def _greeting(url: str, wanted: str) -> str:
    image = '\'{"input": "data:image/png;base64,\'"$(base64 -w0 image.png)"\'"}\''
    return "\n".join(
        [
            f"serving {wanted} at {url}",
            f"  ready?  curl {url}/readyz",
            f"  try it  curl {url}/v1/embeddings -H 'Content-Type: application/json' -d {image}",
            f"  the API {url}/docs",
            "Ctrl-C ends it",
        ]
    )


if __name__ == "__main__":
    # From its full name, so that what travels to the replica is found there too.
    from serve.app import main as run

    run()

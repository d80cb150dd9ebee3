"""Whether what the service stands on can be reached, and what to mend: `python -m cluster.doctor`.

Asks Ray, MLflow, the artifact store, the database, the shared storage and the GPUs, as a pod or a laptop sees them: by
the variables that the other programs read too. It leaves nothing behind but one deleted MLflow run.
"""

import base64
import os
import re
import socket
import sys
import tempfile
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import ray

from cluster import command_line, nodes, session, shared_storage, tracking
from cluster.delivery import client_of, without_password
from cluster.tracking import TrackingError

DATABASE = "ONETHRESHOLD_OPTUNA_STORAGE"
"""The variable by which tune.search finds its database."""
TIMEOUT = 30.0
"""Seconds that each of them has to answer."""


@dataclass(frozen=True)
class Options:
    """Asks Ray, MLflow, the artifacts, the database, the shared storage and the GPUs, and says what to mend.

    Where they are is read from the environment, as by the other programs: RAY_ADDRESS, MLFLOW_TRACKING_URI,
    ONETHRESHOLD_OPTUNA_STORAGE. Ends with status 1 when something must be mended.
    """

    storage: str = ""
    """Where checkpoints are to go: a path that every node sees, or a URI."""


@dataclass(frozen=True)
class Finding:
    """What one question found.

    Attributes:
        about: what was asked.
        state: ok; note, which may be as it should; fault.
        said: what it is, or what is wrong.
        mend: of a fault, what to do.
    """

    about: str
    state: Literal["ok", "note", "fault"]
    said: str
    mend: str = ""


def examine(storage: str = "") -> Iterator[Finding]:
    """Asks one after the other, none of them for longer than a minute.

    Args:
        storage: path or URI that checkpoints are to go to; empty asks nothing of it.
    """
    yield Finding("versions", "ok", _shown(nodes.versions()))
    joined = False
    for finding in ray_cluster():
        joined = joined or (finding.about == "ray" and finding.state == "ok")
        yield finding
    yield from gpus() if joined else ()
    yield from mlflow()
    yield database(os.environ.get(DATABASE, ""))
    yield shared(storage, joined=joined)


def ray_cluster() -> Iterator[Finding]:
    """Joins the cluster at RAY_ADDRESS and asks every node for its versions."""
    address = os.environ.get("RAY_ADDRESS", "")
    if not address and not ray.is_initialized():
        yield Finding("ray", "note", "RAY_ADDRESS is not set: work runs on this machine alone")
        return
    found = re.fullmatch(r"(?:ray://)?([\w.-]+):(\d+)", address)
    if found and not ray.is_initialized() and (refused := _refused(found[1], int(found[2]))):
        mend = "is the head up, the name right, and does a NetworkPolicy let this pod reach it?"
        yield Finding("ray", "fault", f"{address}: {refused}", mend)
        return
    try:
        session.connect()
        count = len(nodes.alive())
    except Exception as error:  # Ray raises what it likes
        yield Finding("ray", "fault", f"{address}: {_line(error)}", _mend_ray(str(error)))
        return
    total = ray.cluster_resources()
    yield Finding("ray", "ok", f"{count} nodes, {total.get('CPU', 0):g} CPU, {total.get('GPU', 0):g} GPU")
    yield _agreement()


def gpus() -> Iterator[Finding]:
    """Computes something on a GPU of each node that has any."""
    having = [node for node in nodes.alive() if node["Resources"].get("GPU", 0) > 0]
    if not having:
        yield Finding("gpus", "note", "none in the cluster now; an autoscaler brings them when a job asks")
    for address, answer in nodes.ask(nodes.compute, having, TIMEOUT, num_gpus=0.01):
        if answer is None:
            yield Finding("gpus", "note", f"{address}: no answer, its GPUs are taken")
        elif isinstance(answer, Exception):
            mend = "does the node's driver fit torch's CUDA, and is it the image with CUDA (make image TARGET=gpu)?"
            yield Finding("gpus", "fault", f"{address}: {_line(answer)}", mend)
        else:
            yield Finding("gpus", "ok", f"{address}: {answer}")


def mlflow() -> Iterator[Finding]:
    """The server's health, version and rights, then an artifact there and back."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        yield Finding("mlflow", "note", "MLFLOW_TRACKING_URI is not set: runs go to SQLite on this machine")
        return
    uri = tracking.connect()
    shown = without_password(uri)
    if uri.startswith(("http://", "https://")):
        try:
            theirs = _get(f"{uri}/version")
        except OSError as error:
            yield Finding("mlflow", "fault", f"{shown}: {_line(error)}", _mend_mlflow(str(error)))
            return
        if theirs != nodes.versions()["mlflow"]:
            mend = "run the server from the image that the pods run"
            yield Finding("mlflow", "fault", f"{shown} is {theirs}, here it is {nodes.versions()['mlflow']}", mend)
            return
    try:
        with tracking.one_line(uri):
            client_of(uri).search_experiments(max_results=1)
    except TrackingError as error:
        yield Finding("mlflow", "fault", str(error), _mend_mlflow(str(error)))
        return
    yield Finding("mlflow", "ok", shown)
    yield _artifacts(uri)


def database(url: str) -> Finding:
    """Opens the database of Optuna's studies.

    Args:
        url: as ONETHRESHOLD_OPTUNA_STORAGE has it; empty asks nothing.
    """
    if not url:
        return Finding("database", "note", f"{DATABASE} is not set: studies go to SQLite on this machine")
    import sqlalchemy
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # its message would show a password
        return Finding("database", "fault", f"{DATABASE} is no URL of a database", "postgresql://user@host/database")
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    shown = parsed.render_as_string(hide_password=True)
    arguments = {"connect_timeout": int(TIMEOUT)} if parsed.drivername.startswith("postgresql") else {}
    try:
        engine = sqlalchemy.create_engine(parsed, connect_args=arguments)
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("SELECT 1"))
            release = ".".join(map(str, connection.dialect.server_version_info or ()))
        engine.dispose()
    except ImportError as error:
        return Finding("database", "fault", f"{shown}: {error}", "pip install 'psycopg[binary]'")
    except SQLAlchemyError as error:
        reason = _line(getattr(error, "orig", None) or error)
        return Finding("database", "fault", f"{shown}: {reason}", _mend_database(reason))
    return Finding("database", "ok", f"{shown} ({parsed.get_backend_name()} {release})")


def shared(storage: str, *, joined: bool) -> Finding:
    """Writes a file to the storage and, in a cluster, asks every node for it.

    Args:
        storage: absolute path or URI; empty asks nothing.
        joined: whether Ray is connected.
    """
    if not storage:
        return Finding("storage", "note", "--storage is not given: not asked")
    import pyarrow
    import pyarrow.fs

    place = session.local_path(storage)
    try:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(place)
        filesystem.create_dir(path)
        probe = f"{path}/.doctor-{uuid.uuid4().hex}"
        with filesystem.open_output_stream(probe) as stream:
            stream.write(b"seen")
        filesystem.delete_file(probe)
        if joined:
            shared_storage.check(place)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        mend = "mount the same volume, writable for user 1000, in the head and in all workers"
        return Finding("storage", "fault", f"{place}: {_line(error)}", mend)
    return Finding("storage", "ok", f"{place}{', on every node' if joined else ''}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 when something must be mended."""
    options = command_line.read(Options, sys.argv[1:] if argv is None else argv)
    faults = 0
    for finding in examine(options.storage):
        faults += finding.state == "fault"
        print(f"{finding.state:6}{finding.about:10}{finding.said}", flush=True)
        if finding.mend:
            print(f"{'':16}-> {finding.mend}", flush=True)
    print(f"{faults or 'nothing'} to mend")
    return 1 if faults else 0


def _agreement() -> Finding:
    """Whether all nodes have the versions of this process."""
    here, others = nodes.versions(), []
    for address, answer in nodes.ask(nodes.versions, nodes.alive(), TIMEOUT):
        if not isinstance(answer, dict):
            said = "no answer" if answer is None else _line(answer)
            return Finding("nodes", "fault", f"{address}: {said}", "do its pods run, with the image of the others?")
        differing = (name for name in here if answer.get(name) != here[name])
        others += [f"{address} has {name} {answer.get(name)}, here {here[name]}" for name in differing]
    if others:
        return Finding("nodes", "fault", "; ".join(others), "give all pods, and this machine, the same image")
    return Finding("nodes", "ok", "the same versions on all")


def _artifacts(uri: str) -> Finding:
    """An artifact of a run that is deleted at once."""
    try:
        store = tracking.Store.open()
        client = client_of(uri)
        with tracking.one_line(uri), tempfile.TemporaryDirectory() as folder:
            run = client.create_run(store.experiment, run_name="doctor").info.run_id
            try:
                client.log_text(run, "seen", "doctor.txt")
                with open(client.download_artifacts(run, "doctor.txt", folder)) as file:
                    seen = file.read()
            finally:
                client.delete_run(run)
    except (TrackingError, OSError) as error:
        if "Permission denied" in str(error) and "403" in str(error):
            return Finding("artifacts", "note", "this user of MLflow may only read: not written")
        mend = "does the server run with --artifacts-destination, and may it write there?"
        return Finding("artifacts", "fault", _line(error), mend)
    if seen != "seen":
        return Finding("artifacts", "fault", "what was written is not what was read", "look at the server's log")
    return Finding("artifacts", "ok", "written and read")


def _refused(host: str, port: int) -> str:
    """Why a port does not open; empty when it does."""
    try:
        with socket.create_connection((host, port), timeout=10):
            return ""
    except OSError as error:
        return str(error)


def _get(url: str) -> str:
    """Asks as MLflow's client does: as the user that the address names, else as that of the environment."""
    parsed = urllib.parse.urlsplit(url)
    user, password = (urllib.parse.unquote(text or "") for text in (parsed.username, parsed.password))
    if not user:
        user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    known = base64.b64encode(f"{user}:{password}".encode()).decode()
    url = parsed._replace(netloc=parsed.netloc.rpartition("@")[2]).geturl()
    request = urllib.request.Request(url, headers={"Authorization": f"Basic {known}"} if user else {})  # noqa: S310
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:  # noqa: S310  # the person's own address
        return str(answer.read().decode(errors="replace").strip())


def _shown(found: Mapping[str, str]) -> str:
    return "  ".join(f"{name} {value}" for name, value in found.items())


def _line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if isinstance(error, ray.exceptions.RayError) else lines[0])[:300] if lines else repr(error)


def _first(text: str, hints: Mapping[str, str], otherwise: str) -> str:
    return next((hint for sign, hint in hints.items() if sign.lower() in text.lower()), otherwise)


_MISSING_TOKEN = "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN of the cluster (Secret ray, auth_token)"  # noqa: S105


def _mend_ray(said: str) -> str:
    hints = {"token": _MISSING_TOKEN, "auth": _MISSING_TOKEN, "version mismatch": "install the cluster's versions here"}
    return _first(said, hints, "look at the head's log")


def _mend_mlflow(said: str) -> str:
    hosts = "list host:port as it is called here in the server's MLFLOW_SERVER_ALLOWED_HOSTS"
    users = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of a user that the server knows (Secret mlflow)"
    away = "is MLFLOW_TRACKING_URI right, the server up, and does a NetworkPolicy let this pod reach it?"
    hints = {"Invalid Host": hosts, "401": users, "not authenticated": users, "urlopen error": away, "timed out": away}
    return _first(said, hints, "look at the server's log")


def _mend_database(said: str) -> str:
    hints = {
        "password": "PGPASSWORD, or the password in the URL, is not that user's (Secret postgres)",
        "permission": "is it this user's database? ConfigMap postgres says who owns which",
        "does not exist": "it is made when PostgreSQL's volume is new: CREATE DATABASE by hand on an older one",
    }
    return _first(said, hints, "is the server up, the name right, and does a NetworkPolicy let this pod reach it?")


if __name__ == "__main__":
    # From its full name: what travels to the nodes is found there too.
    from cluster.doctor import main as run

    raise SystemExit(run())

"""MLflow runs: where they are stored, how they begin and end, and how what is recorded of them gets there."""

import argparse
import importlib
import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cluster import delivery, environment
from cluster.delivery import Delivery, client_of, reason, without_password
from cluster.outbox import Outbox, OutboxInUse, Sender, holds, waiting
from cluster.writer import Writer

EXPERIMENT = "onethreshold"
PARENT_TAG = "mlflow.parentRunId"
KEY_TAG = "onethreshold.key"
GRACE = 30.0
"""Seconds that the end of a run waits for its last records to be sent."""


class TrackingError(RuntimeError):
    """The tracking server cannot be reached, or refuses; one line.

    Attributes:
        away: a later try may succeed.
    """

    def __init__(self, message: str, *, away: bool) -> None:
        super().__init__(message)
        self.away = away


def runs_dir() -> Path:
    """The folder of everything that a run leaves on this machine: ./runs."""
    return Path("runs").absolute()


def import_ahead() -> None:
    """Imports MLflow on a thread, which takes seconds, while the caller waits for something else."""
    threading.Thread(target=importlib.import_module, args=["mlflow"], name="import-mlflow", daemon=True).start()


def connect() -> str:
    """Points MLflow at its store and returns the tracking URI.

    MLFLOW_TRACKING_URI is honoured; unset, the store is SQLite at runs/mlflow.db.
    """
    import mlflow

    # Every table that it creates and every version that it registers is a line otherwise.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    # A progress bar for each of ten small files would drown what our programs print.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        runs_dir().mkdir(parents=True, exist_ok=True)
        uri = f"sqlite:///{runs_dir() / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    return uri


@dataclass(frozen=True)
class Store:
    """Where runs go; plain strings, so that it travels to the workers.

    Attributes:
        uri: MLflow tracking URI.
        experiment: MLflow experiment id.
        outbox: folder of what has not been sent yet.
    """

    uri: str
    experiment: str
    outbox: str

    @classmethod
    def open(cls, storage: str = "") -> Self:
        """Connects to the store, creating database and experiment when they are missing.

        Args:
            storage: a folder that every node sees, if there is one: unsent metrics wait in its folder outbox, where a
                person finds them whichever node wrote them. Else, and for a URI, in runs/outbox of this path.
                Artifacts of a store without a server go into artifacts of it, or of runs/.

        Raises:
            TrackingError: the server does not answer, or refuses.
        """
        uri = connect()
        client = client_of(uri)
        outbox = str(Path(storage) / "outbox" if storage and "://" not in storage else runs_dir() / "outbox")
        with one_line(uri):
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is not None:
                return cls(uri, found.experiment_id, outbox)
            # Without a server MLflow would put artifacts into ./mlruns of whatever folder a worker runs in.
            place = storage if "://" in storage else Path(storage or runs_dir()).absolute().as_uri()
            artifacts = f"{place}/artifacts" if uri.startswith("sqlite:") else None
            return cls(uri, client.create_experiment(EXPERIMENT, artifact_location=artifacts), outbox)

    def start(
        self,
        name: str,
        *,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        parent: str | None = None,
        key: str = "",
        patience: float = 0.0,
    ) -> "Run":
        """Starts a run, or goes on with the one of the same key; one without a parent is tagged with the commit.

        Args:
            name: shown in the UI.
            params: flat settings.
            tags: free text by name.
            parent: run id of the search that it belongs to.
            key: names the run once and for all, so that a trial that is run again does not show twice.
            patience: seconds to wait for a server that is away.

        Raises:
            TrackingError: the server does not answer, or refuses.
        """
        links = {PARENT_TAG: parent} if parent is not None else environment.commit(Path.cwd())
        links |= {KEY_TAG: key} if key else {}
        until = time.monotonic() + patience
        while True:
            try:
                with one_line(self.uri):
                    return self._start(name, params, {**tags, **links}, key)
            except TrackingError as error:
                if not error.away or time.monotonic() >= until:
                    raise
                time.sleep(2.0)

    def _start(self, name: str, params: Mapping[str, object], tags: Mapping[str, str], key: str) -> "Run":
        from mlflow.entities import Param

        client = client_of(self.uri)
        same = f"tags.`{KEY_TAG}` = '{key}'"
        found = client.search_runs([self.experiment], same, max_results=1) if key else []
        if found:
            client.update_run(found[0].info.run_id, status="RUNNING")
        run = found[0] if found else client.create_run(self.experiment, run_name=name, tags=dict(tags))
        # Also of one that was found: the server may have gone away between making it and this.
        missing = [Param(name, str(value)) for name, value in params.items() if name not in run.data.params]
        client.log_batch(run.info.run_id, params=missing)
        return Run(self.uri, run.info.run_id, self.outbox, run.info.start_time)

    def find(self, run_id: str) -> "Found | None":
        """A run by its id, of whatever experiment; None when there is none.

        Raises:
            TrackingError: the server does not answer, or refuses.
        """
        from mlflow.exceptions import MlflowException

        with one_line(self.uri):
            try:
                found = client_of(self.uri).get_run(run_id)
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return None
                raise
        return Found(Run(self.uri, found.info.run_id, self.outbox, found.info.start_time), dict(found.data.tags))

    def json(self, run_id: str, name: str) -> Any:
        """The content of a run's JSON artifact; None when it has none of this name.

        Raises:
            TrackingError: the server does not answer, or refuses.
        """
        client = client_of(self.uri)
        with one_line(self.uri), tempfile.TemporaryDirectory() as scratch:
            if name not in [item.path for item in client.list_artifacts(run_id)]:
                return None
            return json.loads(Path(client.download_artifacts(run_id, name, scratch)).read_text())

    def end_children(self, parent: str) -> int:
        """Ends as KILLED every run of a search that is still RUNNING; returns how many there were.

        Raises:
            TrackingError: the server does not answer, or refuses.
        """
        client = client_of(self.uri)
        running = f"tags.`{PARENT_TAG}` = '{parent}' and attributes.status = 'RUNNING'"
        with one_line(self.uri):
            left = client.search_runs([self.experiment], running)
            for run in left:
                client.set_terminated(run.info.run_id, status="KILLED")
        return len(left)

    def tag(self, run_id: str, name: str) -> str:
        """A tag of a run; empty where it has none of this name.

        Raises:
            TrackingError: the server does not answer, or refuses.
        """
        with one_line(self.uri):
            return str(client_of(self.uri).get_run(run_id).data.tags.get(name, ""))

    def tag_children(self, parent: str, tags: Mapping[str, Mapping[str, str]]) -> None:
        """Sets tags of the runs of a search.

        Args:
            parent: run id of the search.
            tags: by the key that a run was started with; runs of other keys are left as they are.

        Raises:
            TrackingError: the server does not answer, or refuses.
        """
        from mlflow.entities import RunTag

        client, token, children = client_of(self.uri), None, f"tags.`{PARENT_TAG}` = '{parent}'"
        with one_line(self.uri):
            while True:
                page = client.search_runs([self.experiment], children, page_token=token)
                for run in page:
                    wanted = tags.get(run.data.tags.get(KEY_TAG, ""), {})
                    if not wanted.items() <= run.data.tags.items():
                        client.log_batch(run.info.run_id, tags=[RunTag(name, value) for name, value in wanted.items()])
                token = page.token
                if not token:
                    return


@dataclass(frozen=True)
class Run:
    """One MLflow run; plain values, so that it travels to the workers.

    Attributes:
        uri: MLflow tracking URI.
        run_id: MLflow run id.
        outbox: folder of what has not been sent yet, in a folder of the run's id.
        began: when the run was first started, in milliseconds since 1970.
    """

    uri: str
    run_id: str
    outbox: str
    began: int

    @property
    def unsent(self) -> Path:
        """The folder of what has not been sent; there is none once all of it has arrived."""
        return Path(self.outbox) / self.run_id

    @contextmanager
    def writing(self) -> Iterator[Writer]:
        """Records what the block says of the run, and sends it meanwhile; one process at a time.

        A server that is away delays nothing. What it has not got at the end of the block stays in `unsent`.

        Raises:
            OutboxInUse: another process still writes, for a minute on end.
        """
        box = Outbox(self.unsent, wait=60.0)
        (self.unsent / "uri").write_text(without_password(self.uri))
        sender = Sender(box, Delivery(self.uri, self.run_id, self.unsent))
        try:
            yield Writer(box, sender.wake)
        finally:
            sender.close(GRACE)
            box.close()

    @contextmanager
    def ending(self) -> Iterator[Self]:
        """Ends the run with the block: FINISHED; FAILED after an error, kept in a tag; KILLED when stopped."""
        try:
            yield self
        except OutboxInUse:
            raise  # it is another process's
        except BaseException as error:
            with self.writing() as record:
                record.tags({"error": f"{type(error).__name__}: {error}"[:5000]})
                record.status("FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        with self.writing() as record:
            record.status("FINISHED")

    @contextmanager
    def closing(self) -> Iterator[Writer]:
        """`writing` and `ending`, where one process does both."""
        with self.ending(), self.writing() as record:
            yield record


@dataclass(frozen=True)
class Found:
    """A run as the store has it."""

    run: Run
    tags: Mapping[str, str]


def unsent_warning(folder: Path) -> str:
    """Says where records lie that have not arrived, and how to send them; empty when there are none."""
    if not holds(folder):
        return ""
    where = "" if folder.parent == runs_dir() / "outbox" else f" --outbox {folder.parent}"
    uri = (folder / "uri").read_text() if (folder / "uri").is_file() else "the MLflow server"
    return (
        f"not everything has reached {uri}; the rest lies in {folder}. "
        f"Send it, once the server answers: python -m cluster.tracking flush{where}"
    )


@contextmanager
def one_line(uri: str) -> Iterator[None]:
    """Says what MLflow's client raises in one line, without a password.

    Args:
        uri: of the store.

    Raises:
        TrackingError: the block raised an MlflowException.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        away = error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
        raise TrackingError(f"MLflow at {without_password(uri)}: {reason(error)}", away=away) from error


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m cluster.tracking ui` shows the runs; `flush` sends what a server that was away has not got."""
    parser = argparse.ArgumentParser(prog="python -m cluster.tracking", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ui = commands.add_parser("ui", help="browse runs, figures and models in the MLflow UI")
    ui.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    ui.add_argument("--port", type=int, default=5000, help="port to listen on (default: %(default)s)")
    unsent = commands.add_parser("flush", help="send the metrics that a tracking server which was away has not got")
    unsent.add_argument(
        "--outbox", type=Path, default=runs_dir() / "outbox", help="folder that they wait in (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    if options.command == "flush":
        if not any(waiting(options.outbox)):
            print(f"nothing waits in {options.outbox}")
        return 1 if delivery.flush(options.outbox) else 0
    _show(options.host, options.port)
    return 0


def _show(host: str, port: int) -> None:
    uri = connect()
    if uri.startswith(("http://", "https://")):
        print(f"MLFLOW_TRACKING_URI is a server: open {without_password(uri)} in a browser")
        return
    print(f"MLflow UI of {without_password(uri)} at http://{host}:{port}  (Ctrl-C ends it)", flush=True)
    server = ["-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", host, "--port", str(port)]
    os.execv(sys.executable, [sys.executable, *server])  # noqa: S606  # no shell, and Ctrl-C reaches it


if __name__ == "__main__":
    raise SystemExit(main())

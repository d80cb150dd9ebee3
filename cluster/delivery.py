"""The way from an outbox to MLflow: in bounded time, each metric of a step once."""

import logging
import os
import re
import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.outbox import Outbox, OutboxInUse, Record, send, waiting
from cluster.writer import FILES

if TYPE_CHECKING:
    from mlflow import MlflowClient

BOUNDS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
}
"""MLflow's client alone would try for minutes; what is recorded can wait in the outbox. A person's own values hold."""


class Delivery:
    """Brings records to MLflow, each metric of a step once.

    Records come again after a crash between sending and marking, and steps are trained again after a resume, with the
    same values at another time. So it asks first which step each metric has come to, and leaves out what is not later.
    """

    def __init__(self, uri: str, run_id: str, folder: Path) -> None:
        self._uri, self._run_id, self._folder = uri, run_id, folder
        self._last: dict[str, int] | None = None

    def __call__(self, records: list[Record]) -> None:
        """Sends records in order.

        Raises:
            Exception: the store cannot be reached, or refuses; the same records can be given again.
        """
        client = client_of(self._uri)
        if self._last is None:
            known = client.get_run(self._run_id).data.to_proto().metrics
            self._last = {metric.key: metric.step for metric in known}
        ways = {
            "metrics": self._metrics,
            "summary": self._summary,
            "tags": self._tags,
            "file": self._files,
            "status": self._status,
        }
        try:
            for kind, group in groupby(records, key=lambda record: next(iter(record))):
                # The end of a run that is gone on with is no end.
                if kind != "status" or "status" in records[-1]:
                    ways[kind](client, list(group))
        except BaseException:
            self._last = None  # a part may have arrived
            raise

    def _metrics(self, client: "MlflowClient", records: list[Record]) -> None:
        from mlflow.entities import Metric

        assert self._last is not None
        values = []
        for record in records:
            for name, value in record["metrics"].items():
                if record["step"] > self._last.get(name, -1):
                    self._last[name] = record["step"]
                    values.append(Metric(name, value, record["time"], record["step"]))
        for start in range(0, len(values), 1000):
            client.log_batch(self._run_id, metrics=values[start : start + 1000])

    def _summary(self, client: "MlflowClient", records: list[Record]) -> None:
        from mlflow.entities import Metric

        for record in records:
            values = [Metric(name, value, record["time"], 0) for name, value in record["summary"].items()]
            client.log_batch(self._run_id, metrics=values)

    def _tags(self, client: "MlflowClient", records: list[Record]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, value) for record in records for key, value in record["tags"].items()]
        client.log_batch(self._run_id, tags=list({tag.key: tag for tag in tags}.values()))

    def _files(self, client: "MlflowClient", records: list[Record]) -> None:
        for record in records:
            name = Path(record["file"])
            into = str(name.parent) if name.parent != Path() else None
            client.log_artifact(self._run_id, str(self._folder / FILES / name), into)

    def _status(self, client: "MlflowClient", records: list[Record]) -> None:
        last = records[-1]
        client.set_terminated(self._run_id, status=last["status"], end_time=last["time"])


def flush(folder: Path) -> int:
    """Sends every outbox under a folder, and removes what has arrived; returns how many are left for another time."""
    left = 0
    for path in list(waiting(folder)):
        try:
            with Outbox(path) as box:
                count = send(box, Delivery(_uri_of(path), path.name, path))
        except OutboxInUse:
            print(f"run {path.name} is still going on and sends its records itself")
        except Exception as error:
            left += 1
            print(f"error: run {path.name}: {reason(error)}; its records stay in {path}", file=sys.stderr)
        else:
            print(f"run {path.name}: {count:,} records sent")
    return left


def without_password(uri: str) -> str:
    """A tracking URI as it may be printed and written down."""
    return re.sub(r"//[^/\s]*@", "//", uri)


def _uri_of(outbox: Path) -> str:
    """Where the records of an outbox go: its own store, by the way that MLFLOW_TRACKING_URI knows to it, if it does."""
    noted = (outbox / "uri").read_text()
    own = os.environ.get("MLFLOW_TRACKING_URI", "")
    return own if without_password(own) == noted else noted


def reason(error: Exception) -> str:
    """What a person needs of an error of MLflow's client, which quotes those of the libraries below it whole."""
    text = without_password(str(error)).strip()
    system = re.findall(r"\[Errno -?\d+\] ([^'\")]+)", text)
    if system:
        return f"does not answer ({system[-1]})"
    return "does not answer in time" if "timed out" in text else text.splitlines()[0][:300] if text else repr(error)


def client_of(uri: str) -> "MlflowClient":
    """A client that waits for an answer in bounded time; what comes too late is an error."""
    from mlflow import MlflowClient

    for name, value in BOUNDS.items():
        os.environ.setdefault(name, value)
    # Each try on a server that is away is several lines otherwise.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    return MlflowClient(uri)

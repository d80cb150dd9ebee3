"""MLflow runs: where they are stored, and what is written to them."""

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient

EXPERIMENT = "onethreshold"
PARENT_TAG = "mlflow.parentRunId"
KEY_TAG = "onethreshold.key"


def runs_dir() -> Path:
    """The folder of everything that a run leaves on this machine: ./runs."""
    return Path("runs").absolute()


def connect() -> str:
    """Points MLflow at its store and returns the tracking URI.

    MLFLOW_TRACKING_URI is honoured; unset, the store is SQLite at runs/mlflow.db.
    """
    import mlflow

    # Every table that it creates and every version that it registers is a line otherwise.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
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
    """

    uri: str
    experiment: str

    @classmethod
    def open(cls) -> Self:
        """Connects to the store, creating database and experiment when they are missing."""
        uri = connect()
        client = _client(uri)
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is not None:
            return cls(uri, found.experiment_id)
        # Without a server MLflow would put artifacts into ./mlruns of whatever folder a worker runs in.
        artifacts = (runs_dir() / "artifacts").as_uri() if uri.startswith("sqlite:") else None
        return cls(uri, client.create_experiment(EXPERIMENT, artifact_location=artifacts))

    def start(
        self,
        name: str,
        *,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        parent: str | None = None,
        key: str = "",
    ) -> "Run":
        """Starts a run, or goes on with the one of the same key.

        Args:
            name: shown in the UI.
            params: flat settings.
            tags: free text by name.
            parent: run id of the search that it belongs to.
            key: names the run once and for all, so that a trial that is run again does not show twice.
        """
        client = _client(self.uri)
        if key:
            for found in client.search_runs([self.experiment], f"tags.`{KEY_TAG}` = '{key}'", max_results=1):
                client.update_run(found.info.run_id, status="RUNNING")
                return Run(self.uri, found.info.run_id)
        links = ({PARENT_TAG: parent} if parent is not None else {}) | ({KEY_TAG: key} if key else {})
        created = client.create_run(self.experiment, run_name=name, tags={**tags, **links})
        run = Run(self.uri, created.info.run_id)
        run.params(params)
        return run

    def end_children(self, parent: str) -> int:
        """Ends as KILLED every run of a search that is still RUNNING; returns how many there were."""
        client = _client(self.uri)
        running = f"tags.`{PARENT_TAG}` = '{parent}' and attributes.status = 'RUNNING'"
        left = client.search_runs([self.experiment], running)
        for run in left:
            client.set_terminated(run.info.run_id, status="KILLED")
        return len(left)

    def tag(self, run_id: str, name: str) -> str:
        """A tag of a run; empty where it has none of this name."""
        return str(_client(self.uri).get_run(run_id).data.tags.get(name, ""))

    def tag_children(self, parent: str, tags: Mapping[str, Mapping[str, str]]) -> None:
        """Sets tags of the runs of a search.

        Args:
            parent: run id of the search.
            tags: by the key that a run was started with; runs of other keys are left as they are.
        """
        client, token = _client(self.uri), None
        while True:
            page = client.search_runs([self.experiment], f"tags.`{PARENT_TAG}` = '{parent}'", page_token=token)
            for run in page:
                wanted = tags.get(run.data.tags.get(KEY_TAG, ""), {})
                if not wanted.items() <= run.data.tags.items():
                    Run(self.uri, run.info.run_id).tags(wanted)
            token = page.token
            if not token:
                return


@dataclass(frozen=True)
class Run:
    """One MLflow run that is being written.

    Attributes:
        uri: MLflow tracking URI.
        run_id: MLflow run id.
    """

    uri: str
    run_id: str

    def params(self, params: Mapping[str, object]) -> None:
        """Logs flat settings; each can be logged once, with one value."""
        from mlflow.entities import Param

        _client(self.uri).log_batch(self.run_id, params=[Param(key, str(value)) for key, value in params.items()])

    def metrics(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        """Logs metrics by step, in one round trip a thousand values."""
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        values = [
            # MLflow allows no "@" in a metric's name.
            Metric(name.replace("@", "_at_"), value, now, step)
            for step, row in rows.items()
            for name, value in row.items()
        ]
        for start in range(0, len(values), 1000):
            _client(self.uri).log_batch(self.run_id, metrics=values[start : start + 1000])

    def tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags."""
        from mlflow.entities import RunTag

        _client(self.uri).log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def figure(self, figure: "Figure", name: str) -> None:
        """Logs a matplotlib figure as an artifact, e.g. figures/utility.png."""
        _client(self.uri).log_figure(self.run_id, figure, name)

    def json(self, content: Mapping[str, object], name: str) -> None:
        """Logs a JSON artifact."""
        _client(self.uri).log_dict(self.run_id, dict(content), name)

    def files(self, folder: Path) -> None:
        """Logs all files of a folder as artifacts."""
        _client(self.uri).log_artifacts(self.run_id, str(folder))

    @contextmanager
    def closing(self) -> Iterator[Self]:
        """Ends the run with the block: FINISHED; FAILED after an error, kept in a tag; KILLED when stopped."""
        client = _client(self.uri)
        try:
            yield self
        except BaseException as error:
            self.tags({"error": f"{type(error).__name__}: {error}"[:5000]})
            client.set_terminated(self.run_id, status="FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        client.set_terminated(self.run_id)


def _client(uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient(uri)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m cluster.tracking ui`: the MLflow UI of the store that runs are written to, on loopback."""
    parser = argparse.ArgumentParser(prog="python -m cluster.tracking", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ui = commands.add_parser("ui", help="browse runs, figures and models in the MLflow UI")
    ui.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    ui.add_argument("--port", type=int, default=5000, help="port to listen on (default: %(default)s)")
    options = parser.parse_args(argv)
    uri = connect()
    if uri.startswith(("http://", "https://")):
        print(f"MLFLOW_TRACKING_URI is a server: open {uri} in a browser")
        return
    print(f"MLflow UI of {uri} at http://{options.host}:{options.port}  (Ctrl-C ends it)", flush=True)
    server = ["-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", options.host, "--port", str(options.port)]
    os.execv(sys.executable, [sys.executable, *server])  # noqa: S606  # no shell, and Ctrl-C reaches it


if __name__ == "__main__":
    main()

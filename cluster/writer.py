"""What can be said of a run: metrics, tags, figures, files and its end, as records of an outbox."""

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from cluster.outbox import Outbox

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Status: TypeAlias = Literal["FINISHED", "FAILED", "KILLED"]

FILES = "files"
"""Folder of an outbox that holds its artifacts."""


class Writer:
    """Writes one run; each call returns at once, whether the tracking server is there or not.

    Args:
        outbox: takes the records.
        wake: called after each.
    """

    def __init__(self, outbox: Outbox, wake: Callable[[], None]) -> None:
        self._outbox, self._wake = outbox, wake

    def metrics(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        """Metrics by step. What the run has of a metric for this step or a later one is not written again."""
        now = _milliseconds()
        for step in sorted(rows):
            named = {metric_name(name): float(value) for name, value in rows[step].items()}
            self._outbox.append({"metrics": named, "step": step, "time": now})
        self._wake()

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Metrics of the whole run, which have no steps; said again, the later ones hold."""
        named = {metric_name(name): float(value) for name, value in metrics.items()}
        self._add({"summary": named, "time": _milliseconds()})

    def tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags."""
        self._add({"tags": dict(tags)})

    def figure(self, figure: "Figure", name: str) -> None:
        """A matplotlib figure as an artifact, e.g. figures/utility.png."""
        figure.savefig(self._place(name), dpi=130)
        self._add({"file": name})

    def json(self, content: Mapping[str, object] | Sequence[object], name: str) -> None:
        """A JSON artifact."""
        self._place(name).write_text(json.dumps(content, indent=2))
        self._add({"file": name})

    def files(self, folder: Path, into: str = "") -> None:
        """All files of a folder as artifacts, under the folder `into`."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = str(Path(into) / path.relative_to(folder))
                shutil.copyfile(path, self._place(name))
                self._add({"file": name})

    def status(self, status: Status) -> None:
        """How the run ended."""
        self._add({"status": status, "time": _milliseconds()})

    def _place(self, name: str) -> Path:
        path = self._outbox.folder / FILES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _add(self, record: dict[str, object]) -> None:
        self._outbox.append(record)
        self._wake()


def metric_name(name: str) -> str:
    """A name that MLflow allows: recall@1 becomes recall_at_1, and anything else that it refuses an underscore."""
    return re.sub(r"[^/\w.\- :]", "_", name.replace("@", "_at_"))[:250]


def _milliseconds() -> int:
    return int(time.time() * 1000)

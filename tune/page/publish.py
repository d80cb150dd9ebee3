"""Where the page of a search goes."""

import datetime
import tempfile
from dataclasses import replace
from pathlib import Path

from cluster.writer import Writer
from tune.page.document import render
from tune.page.findings import Findings

NAME = "report.html"
"""What the page is called among a run's artifacts."""


def publish(findings: Findings, record: Writer, run_id: str, folder: str) -> str:
    """Logs the page as an artifact, and keeps it beside the search's own state where that is a folder.

    Args:
        findings: of the search, to which the time of day is added.
        record: writes the MLflow run of the search.
        run_id: of that run.
        folder: path or URI of the search's state.

    Returns:
        Where it lies, for a person.
    """
    ended = f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    text = render(replace(findings, facts={**findings.facts, "ended": ended}))
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / NAME).write_text(text, encoding="utf-8")
        record.files(Path(made))
    if "://" in folder:
        return f"{NAME} of the MLflow run {run_id}"
    path = Path(folder) / NAME
    path.write_text(text, encoding="utf-8")
    return str(path)

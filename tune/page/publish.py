"""Where the page of a search goes."""

import datetime
import tempfile
from dataclasses import replace
from pathlib import Path

from cluster.tracking import Run
from tune.page.document import render
from tune.page.findings import Findings

NAME = "report.html"
"""What the page is called among a run's artifacts."""


def publish(findings: Findings, run: Run, folder: str) -> str:
    """Logs the page as an artifact, and keeps it beside the search's own state where that is a folder.

    Args:
        findings: of the search, to which the time of day is added.
        run: MLflow run of the search.
        folder: path or URI of the search's state.

    Returns:
        Where it lies, for a person.
    """
    ended = f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    text = render(replace(findings, facts={**findings.facts, "ended": ended}))
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / NAME).write_text(text, encoding="utf-8")
        run.files(Path(made))
    if "://" in folder:
        return f"{NAME} of the MLflow run {run.run_id}"
    path = Path(folder) / NAME
    path.write_text(text, encoding="utf-8")
    return str(path)

"""Whether every node sees the storage that results go to, and what it is to read."""

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster import nodes

TIMEOUT = 60.0
"""Seconds that the nodes have to answer."""
TRACKING = "MLFLOW_TRACKING_URI"


def check(storage: str, option: str = "storage") -> None:
    """Refuses a storage that some node of the cluster does not see; on one node there is nothing to ask.

    A file is left there and each node is asked for it. Else a training would find out when its first checkpoint, which
    a rank on another node wrote, is not there to go on from.

    Args:
        storage: absolute path or URI.
        option: by which a person gave it.

    Raises:
        ValueError: a node does not see it, or does not answer.
    """
    alive = nodes.alive()
    if len(alive) < 2:
        return
    import pyarrow.fs

    filesystem, path = pyarrow.fs.FileSystem.from_uri(storage)
    filesystem.create_dir(path)
    probe = f"{path}/.seen-{uuid.uuid4().hex}"
    with filesystem.open_output_stream(probe) as stream:
        stream.write(b"")
    try:
        answers = list(nodes.ask(sees, alive, TIMEOUT, storage, probe))
    finally:
        filesystem.delete_file(probe)
    _refuse(answers, storage, option)


def check_runs(uri: str) -> None:
    """Refuses MLflow's SQLite database where some node of the cluster does not see it.

    Args:
        uri: MLflow tracking URI; servers are not asked for.

    Raises:
        ValueError: a node does not see it, or does not answer.
    """
    if uri.startswith("sqlite:///"):
        check(str(Path(uri.removeprefix("sqlite:///")).parent), TRACKING)


def check_there(path: str, option: str) -> None:
    """Refuses a file or folder, which is to be read, that some node of the cluster does not see.

    Args:
        path: absolute.
        option: by which a person gave it.

    Raises:
        ValueError: a node does not see it, or does not answer.
    """
    alive = nodes.alive()
    if len(alive) > 1:
        _refuse(list(nodes.ask(sees, alive, TIMEOUT, path, path)), path, option)


def sees(storage: str, probe: str) -> bool:
    """Whether this node finds a file of the storage."""
    import pyarrow.fs

    filesystem, _ = pyarrow.fs.FileSystem.from_uri(storage)
    return bool(filesystem.get_file_info(probe).type != pyarrow.fs.FileType.NotFound)


def _refuse(answers: Sequence[tuple[str, Any]], path: str, option: str) -> None:
    for _, answer in answers:
        if isinstance(answer, Exception):
            raise answer
    give = f"give --{option} a path on a file system that every node mounts"
    if option == "storage":
        give += ", or a URI such as s3://bucket/folder"
    if option == TRACKING:
        give = "there MLflow keeps its runs without a server; start one (mlflow server) and set it"
    for wrong, what in ((False, "do not see"), (None, "do not answer for")):
        which = sorted(address for address, answer in answers if answer is wrong)
        if which:
            raise ValueError(f"{option}: nodes {', '.join(which)} {what} {path}; {give}")

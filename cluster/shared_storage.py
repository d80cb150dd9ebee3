"""Whether every node sees the storage that checkpoints go to."""

import uuid

from cluster import nodes

TIMEOUT = 60.0
"""Seconds that the nodes have to answer."""


def check(storage: str) -> None:
    """Refuses a storage that some node of the cluster does not see; on one node there is nothing to ask.

    A file is left there and each node is asked for it. Else a training would find out when its first checkpoint, which
    a rank on another node wrote, is not there to go on from.

    Args:
        storage: absolute path or URI.

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
    for _, answer in answers:
        if isinstance(answer, Exception):
            raise answer
    for wrong, what in ((False, "do not see it"), (None, "do not answer")):
        which = sorted(address for address, answer in answers if answer is wrong)
        if which:
            raise ValueError(
                f"storage: checkpoints go to {storage}, but nodes {', '.join(which)} {what}; give --storage a path "
                "on a file system that every node mounts, or a URI such as s3://bucket/folder"
            )


def sees(storage: str, probe: str) -> bool:
    """Whether this node finds a file of the storage."""
    import pyarrow.fs

    filesystem, _ = pyarrow.fs.FileSystem.from_uri(storage)
    return bool(filesystem.get_file_info(probe).type != pyarrow.fs.FileType.NotFound)

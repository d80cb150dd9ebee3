"""Whether every node sees the storage that checkpoints go to."""

import uuid
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

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
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    import pyarrow.fs

    filesystem, path = pyarrow.fs.FileSystem.from_uri(storage)
    filesystem.create_dir(path)
    probe = f"{path}/.seen-{uuid.uuid4().hex}"
    with filesystem.open_output_stream(probe) as stream:
        stream.write(b"")
    try:
        asked = {_asked_on(node["NodeID"], storage, probe): node["NodeManagerAddress"] for node in nodes}
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=TIMEOUT)
        blind = sorted(asked[answer] for answer in answered if not ray.get(answer))
    finally:
        filesystem.delete_file(probe)
    for which, what in ((blind, "do not see it"), (sorted(asked[one] for one in silent), "do not answer")):
        if which:
            raise ValueError(
                f"storage: checkpoints go to {storage}, but nodes {', '.join(which)} {what}; give --storage a path "
                "on a file system that every node mounts, or a URI such as s3://bucket/folder"
            )


def _asked_on(node: str, storage: str, probe: str) -> Any:
    on = NodeAffinitySchedulingStrategy(node, soft=False)
    return _sees.options(scheduling_strategy=on).remote(storage, probe)


@ray.remote(num_cpus=0, max_retries=0)
def _sees(storage: str, probe: str) -> bool:
    import pyarrow.fs

    filesystem, _ = pyarrow.fs.FileSystem.from_uri(storage)
    return bool(filesystem.get_file_info(probe).type != pyarrow.fs.FileType.NotFound)

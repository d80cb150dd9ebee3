"""A training's folder under the storage: the record of how it was begun, and the checkpoints that it goes on from.

    STORAGE/NAME/run.json             the record
    STORAGE/NAME/step-000000120-...   checkpoints (dml.checkpoint)

Ray Train copies checkpoints there and deletes old ones, by the list that it keeps beside them. What is there is what
counts when a training goes on: a checkpoint that Ray had no time to list is as good, one that a dying worker left
half-copied is told by its checksums.
"""

import json
import posixpath
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
from pydantic import ValidationError

from dml import checkpoint
from dml.config import Config
from dml.state import State

if TYPE_CHECKING:
    import pyarrow.fs

RANK = "checkpoint_rank"
"""The metric by which Ray Train keeps checkpoints: see `rank`."""
KEPT = 3
"""Checkpoints that are kept: the best, the newest, and the one before the newest."""
_RECORD = "run.json"
_RAY_LIST = "checkpoint_manager_snapshot.json"


def rank(bests: int, *, best: bool) -> float:
    """The place of a checkpoint among those of its run, under which the KEPT highest are those that are wanted.

    Ray Train keeps the highest by one number that is given with each checkpoint, later ones first among equals. With
    n at the n-th best of a run and n - 1/2 from there to the next, the highest is the best, and the others are the
    newest two, or the newest one and the best before.

    Args:
        bests: n, how many epochs so far were better than all before, this one included.
        best: whether this checkpoint is such an epoch's.
    """
    return bests if best else bests - 0.5


@dataclass(frozen=True)
class Record:
    """How a run was begun; what --resume takes up.

    Attributes:
        config: the resolved settings.
        key: names the MLflow run.
        init: where the encoder's first weights came from; empty for new ones.
        resources: what was asked for, by option.
    """

    config: Config
    key: str
    init: str = ""
    resources: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Found:
    """What there is to go on from.

    Attributes:
        name: of the checkpoint's folder; empty when none is usable.
        state: what it holds.
        unusable: what is wrong with each newer one.
    """

    name: str = ""
    state: State | None = None
    unusable: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunFolder:
    """A run's folder; plain strings, so that it travels to the workers.

    Attributes:
        storage: an absolute path that every node sees, or a URI.
        name: of the run.
    """

    storage: str
    name: str

    def begin(self, record: Record) -> None:
        """Writes the record of a new run.

        Raises:
            ValueError: there is a run of this name.
        """
        filesystem, path = self._open()
        if self._exists(_RECORD):
            raise ValueError(f"name: {self.storage} has a run {self.name}; --resume {self.name} goes on with it")
        filesystem.create_dir(path)
        content = {
            "config": record.config.model_dump(),
            "key": record.key,
            "init": record.init,
            "resources": dict(record.resources),
        }
        # Moved to its place when it is whole.
        with filesystem.open_output_stream(f"{path}/.{_RECORD}") as stream:
            stream.write(json.dumps(content, indent=2).encode())
        filesystem.move(f"{path}/.{_RECORD}", f"{path}/{_RECORD}")

    def record(self) -> Record:
        """How the run was begun.

        Raises:
            ValueError: there is no such run (the message lists those that there are), or its record is unreadable.
        """
        if not self._exists(_RECORD):
            others = ", ".join(runs(self.storage)) or "none"
            raise ValueError(f"resume: there is no run {self.name!r} in {self.storage}; runs there: {others}")
        unreadable = f"resume: {self.storage}/{self.name}/{_RECORD} is unreadable"
        try:
            content = json.loads(self._read(_RECORD))
            config = Config.model_validate(content.pop("config"))
            return Record(config, **content)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{unreadable}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{unreadable}: {error}") from error

    def newest(self) -> Found:
        """The newest checkpoint that is whole, read into memory."""
        unusable: list[str] = []
        for name in self._checkpoints():
            try:
                return Found(name, self.state(name), tuple(unusable))
            except (OSError, checkpoint.CheckpointError) as error:
                unusable.append(str(error))
        return Found(unusable=tuple(unusable))

    def state(self, name: str) -> State:
        """Reads a checkpoint.

        Raises:
            CheckpointError: it is not whole.
        """
        with self._checkpoint(name).as_directory() as folder:
            return checkpoint.load_state(folder)

    def best(self) -> str:
        """Path or URI of the best epoch's checkpoint; empty when there is none that is whole."""
        ranked = []
        for name in self._checkpoints():
            try:
                ranked.append((float(json.loads(self._read(f"{name}/checkpoint.json"))["report"][RANK]), name))
            except (OSError, KeyError, ValueError):
                continue
        for place, name in sorted(ranked, reverse=True):
            if place != int(place):
                break
            try:
                with self._checkpoint(name).as_directory() as folder:
                    checkpoint.load(folder)
            except (OSError, checkpoint.CheckpointError):
                continue
            return f"{self.storage}/{self.name}/{name}"
        return ""

    def mend(self) -> str:
        """Sets aside Ray Train's list of checkpoints if it would refuse it; returns why, or nothing.

        Ray writes it in place, so that a driver that is killed meanwhile leaves half of it, and takes none of another
        release or with a checkpoint missing.
        """
        if not self._exists(_RAY_LIST):
            return ""
        try:
            content = json.loads(self._read(_RAY_LIST))
            listed = [result["checkpoint_dir_name"] for result in content["checkpoint_results"]]
            gone = sorted({*listed} - {*self._checkpoints()})
            if content["ray_version"] == ray.__version__ and not gone:
                return ""
            why = f"{', '.join(gone)} missing" if gone else f"it was written by Ray {content['ray_version']}"
        except (KeyError, TypeError, ValueError) as error:
            why = f"it is truncated ({error})"
        filesystem, path = self._open()
        filesystem.move(f"{path}/{_RAY_LIST}", f"{path}/{_RAY_LIST}.unusable")
        return why

    def _open(self) -> "tuple[pyarrow.fs.FileSystem, str]":
        import pyarrow.fs

        filesystem, path = pyarrow.fs.FileSystem.from_uri(self.storage)
        return filesystem, posixpath.join(path, self.name)

    def _exists(self, name: str) -> bool:
        import pyarrow.fs

        filesystem, path = self._open()
        return bool(filesystem.get_file_info(f"{path}/{name}").type != pyarrow.fs.FileType.NotFound)

    def _read(self, name: str) -> bytes:
        filesystem, path = self._open()
        with filesystem.open_input_stream(f"{path}/{name}") as stream:
            return bytes(stream.read())

    def _checkpoint(self, name: str) -> ray.train.Checkpoint:
        filesystem, path = self._open()
        return ray.train.Checkpoint(f"{path}/{name}", filesystem)

    def _checkpoints(self) -> list[str]:
        """Names of the checkpoints, newest first."""
        return sorted((name for name in _folders(self._open()) if re.match(r"step-\d{9}-", name)), reverse=True)


def checkpoint_name(step: int) -> str:
    """A new name, of which later steps sort later."""
    return f"step-{step:09d}-{uuid.uuid4().hex[:8]}"


def runs(storage: str) -> list[str]:
    """Names of the runs under a storage that can be resumed."""
    import pyarrow.fs

    names = _folders(pyarrow.fs.FileSystem.from_uri(storage))
    return sorted(name for name in names if RunFolder(storage, name)._exists(_RECORD))


def _folders(place: "tuple[pyarrow.fs.FileSystem, str]") -> list[str]:
    import pyarrow.fs

    filesystem, path = place
    infos = filesystem.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))
    return [Path(info.path).name for info in infos if info.type == pyarrow.fs.FileType.Directory]

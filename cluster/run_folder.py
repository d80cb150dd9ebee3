"""A training's folder under the storage: the record of how it was begun, and the checkpoints that it goes on from.

    STORAGE/NAME/run.json             the record; search.json of a search, whose trials have folders below it
    STORAGE/NAME/step-000000120-...   checkpoints (dml.checkpoint)
    STORAGE/NAME/ended.json           how it ended, once it has

Ray Train copies checkpoints there and deletes old ones, by the list that it keeps beside them; a trial of one worker
does it itself (`RunFolder.keep`). What is there is what counts when a training goes on: a checkpoint that Ray had no
time to list is as good, one that a dying worker left half-copied is told by its checksums.
"""

import json
import posixpath
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

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
Kind: TypeAlias = Literal["run", "search"]
_ENDED = "ended.json"
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
        resources: what was asked for, by option; of a search all its options.
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
        kind: whether its record is that of a training or of a search.
    """

    storage: str
    name: str
    kind: Kind = "run"

    @property
    def begun(self) -> bool:
        """Whether there is a record."""
        return self._exists(self._record)

    def refuse_taken(self) -> None:
        """Raises ValueError where there is a training or a search of this name."""
        for kind in get_args(Kind):
            if replace(self, kind=kind).begun:
                hint = f"--resume {self.name} goes on with it" if kind == self.kind else "give another --name"
                raise ValueError(f"name: {self.storage} has a {kind} {self.name}; {hint}")

    def begin(self, record: Record) -> None:
        """Writes the record of a new run.

        Raises:
            ValueError: there is a training or a search of this name.
        """
        self.refuse_taken()
        content = {
            "config": record.config.model_dump(),
            "key": record.key,
            "init": record.init,
            "resources": dict(record.resources),
        }
        self._write(self._record, content)

    def record(self) -> Record:
        """How the run was begun.

        Raises:
            ValueError: there is no such run (the message lists those that there are), or its record is unreadable.
        """
        if not self.begun:
            others = ", ".join(runs(self.storage, self.kind)) or "none"
            kinds = "runs" if self.kind == "run" else "searches"
            raise ValueError(
                f"resume: there is no {self.kind} {self.name!r} in {self.storage}; {kinds} there: {others}"
            )
        unreadable = f"resume: {self.storage}/{self.name}/{self._record} is unreadable"
        try:
            content = json.loads(self._read(self._record))
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
        for name in self._best_first():
            try:
                with self._checkpoint(name).as_directory() as folder:
                    checkpoint.load(folder)
            except (OSError, checkpoint.CheckpointError):
                continue
            return f"{self.storage}/{self.name}/{name}"
        return ""

    def keep(self, folder: Path, step: int) -> None:
        """Copies a checkpoint here and leaves, of those before it, the best alone.

        Those of this step or a later one are from before an interruption: this one is in their place.

        Args:
            folder: of `dml.checkpoint.save`, on this machine.
            step: steps that were done by then; of one run ever more.
        """
        import pyarrow.fs

        filesystem, path = self._open()
        name = checkpoint_name(step)
        filesystem.create_dir(f"{path}/{name}")
        pyarrow.fs.copy_files(str(folder), f"{path}/{name}", destination_filesystem=filesystem)
        self._drop([other for other in self._checkpoints() if other != name and _step(other) >= step])
        self._drop([other for other in self._checkpoints() if other not in (name, *self._best_first()[:1])])

    def end(self, report: Mapping[str, Any]) -> None:
        """Notes how it ended, and leaves of a training the best checkpoint alone: nothing goes on from here.

        Args:
            report: anything that JSON holds.
        """
        self._write(_ENDED, dict(report))
        if self.kind == "search":
            return  # its own checkpoints lie in the folders of its trials
        best = posixpath.basename(self.best())
        self._drop([name for name in self._checkpoints() if name != best])

    def ended(self) -> dict[str, Any] | None:
        """What `end` was given; None before."""
        return dict(json.loads(self._read(_ENDED))) if self._exists(_ENDED) else None

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

    @property
    def _record(self) -> str:
        return f"{self.kind}.json"

    def _best_first(self) -> list[str]:
        """Names of the checkpoints of best epochs, the best of all first."""
        ranked = []
        for name in self._checkpoints():
            try:
                ranked.append((float(json.loads(self._read(f"{name}/checkpoint.json"))["report"][RANK]), name))
            except (OSError, KeyError, ValueError):
                continue
        return [name for place, name in sorted(ranked, reverse=True) if place == int(place)]

    def _drop(self, checkpoints: list[str]) -> None:
        filesystem, path = self._open()
        for name in checkpoints:
            filesystem.delete_dir(f"{path}/{name}")

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file, which is moved to its place when it is whole."""
        filesystem, path = self._open()
        filesystem.create_dir(path)
        with filesystem.open_output_stream(f"{path}/.{name}") as stream:
            stream.write(json.dumps(content, indent=2).encode())
        filesystem.move(f"{path}/.{name}", f"{path}/{name}")

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


def _step(name: str) -> int:
    return int(name.split("-")[1])


def runs(storage: str, kind: Kind = "run") -> list[str]:
    """Names of the runs, or searches, under a storage that can be resumed."""
    import pyarrow.fs

    names = _folders(pyarrow.fs.FileSystem.from_uri(storage))
    return sorted(name for name in names if RunFolder(storage, name, kind).begun)


def _folders(place: "tuple[pyarrow.fs.FileSystem, str]") -> list[str]:
    import pyarrow.fs

    filesystem, path = place
    infos = filesystem.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))
    return [Path(info.path).name for info in infos if info.type == pyarrow.fs.FileType.Directory]

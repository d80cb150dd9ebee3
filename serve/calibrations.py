"""The calibrations that a team made for a model: which there are, which is in use, and the way back.

Of a registered version they are tags, which every replica sees; of a checkpoint folder they are files in it. The folder
into which a version was downloaded keeps a copy, so that a service that starts while the registry is down decides as
before.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cluster import registry
from serve.calibration import REGISTERED, Calibration

CURRENT = "current"
"""The key whose value is the id of the calibration in use; absent, the registered one is."""
KEPT = 20
"""Calibrations of a model that can be gone back to, beside the registered one; older ones are dropped."""
TAG = "calibration."
FOLDER = "calibrations"


class Place(Protocol):
    """Texts by key."""

    def read(self) -> Mapping[str, str]:
        """All of them."""

    def write(self, key: str, text: str) -> None:
        """Sets one, whole or not at all."""

    def drop(self, key: str) -> None:
        """Removes one that is there."""


@dataclass(frozen=True)
class Calibrations:
    """The calibrations of one model.

    Attributes:
        place: where those are that a team made.
        registered: gives the one that the model was registered with, if it has one.
        copy: a place that is kept the same, as far as the one in use goes.
    """

    place: Place
    registered: Callable[[], Calibration | None]
    copy: Place | None = None

    @classmethod
    def beside(cls, folder: Path) -> "Calibrations":
        """Those of a checkpoint folder, or of a folder that a version was downloaded into."""
        return cls(_Files(folder / FOLDER), lambda: Calibration.read(folder / registry.OPERATING_POINTS))

    @classmethod
    def of_version(cls, version: registry.ModelVersion) -> "Calibrations":
        """Those of a registered version."""
        folder = registry.download(version)
        local = cls.beside(folder)
        return cls(_Tags(version), local.registered, local.place)

    def current(self) -> Calibration | None:
        """The one in use; None when the model has no operating points at all.

        Raises:
            ValueError: what is stored is no calibration.
            MlflowException: the registry cannot be reached.
            OSError: a file cannot be read, or the copy not written.
        """
        stored = self.place.read()
        chosen = stored.get(CURRENT, REGISTERED)
        if chosen != REGISTERED and chosen not in stored:
            raise ValueError(f"calibration {chosen!r} is in use but not stored")
        found = self.registered() if chosen == REGISTERED else Calibration.of_text(stored[chosen])
        if self.copy is not None:
            _repeat(self.copy, chosen, stored)
        return found

    def listed(self) -> list[Calibration]:
        """All, newest first; the registered one comes last."""
        stored = self.place.read()
        own = [Calibration.of_text(text) for key, text in stored.items() if key != CURRENT]
        own.sort(key=lambda calibration: calibration.created, reverse=True)
        registered = self.registered()
        return own if registered is None else [*own, registered]

    def use(self, calibration: Calibration) -> None:
        """Stores a calibration and puts it to use; of too many, the oldest are dropped."""
        self.place.write(calibration.id, calibration.text)
        self.place.write(CURRENT, calibration.id)
        mine = [each for each in self.listed() if each.created and each.id != calibration.id]
        for old in mine[KEPT - 1 :]:
            self.place.drop(old.id)

    def revert(self, wanted: str) -> Calibration:
        """Puts an earlier calibration to use.

        Args:
            wanted: its id or the beginning of it, or "registered".

        Raises:
            ValueError: there is no such calibration, or several.
        """
        registered, listed = self.registered(), self.listed()
        if wanted == REGISTERED or (registered is not None and wanted == registered.id):
            if registered is None:
                raise ValueError("the model was registered without operating points; there is nothing to go back to")
            self.place.write(CURRENT, REGISTERED)
            return registered
        found = [each for each in listed if wanted and each.created and each.id.startswith(wanted)]
        if len(found) != 1:
            valid = ", ".join(REGISTERED if not each.created else each.id for each in listed) or "none is stored"
            raise ValueError(f"{'no' if not found else 'more than one'} calibration {wanted!r}; valid: {valid}")
        self.place.write(CURRENT, found[0].id)
        return found[0]


def _repeat(copy: Place, chosen: str, stored: Mapping[str, str]) -> None:
    there = copy.read()
    if chosen != REGISTERED and there.get(chosen) != stored[chosen]:
        copy.write(chosen, stored[chosen])
    if there.get(CURRENT, REGISTERED) != chosen:
        copy.write(CURRENT, chosen)
    for key in there.keys() - {CURRENT, chosen}:
        with contextlib.suppress(FileNotFoundError):  # another replica on this machine was faster
            copy.drop(key)


@dataclass(frozen=True)
class _Tags:
    version: registry.ModelVersion

    def read(self) -> Mapping[str, str]:
        tags = registry.tags(self.version)
        return {key.removeprefix(TAG): text for key, text in tags.items() if key.startswith(TAG)}

    def write(self, key: str, text: str) -> None:
        registry.tag(self.version, {TAG + key: text})

    def drop(self, key: str) -> None:
        registry.untag(self.version, TAG + key)


@dataclass(frozen=True)
class _Files:
    folder: Path

    def read(self) -> Mapping[str, str]:
        found = {}
        for path in sorted(self.folder.glob("*.json")):
            with contextlib.suppress(FileNotFoundError):  # dropped just now
                found[path.stem] = path.read_text()
        return found

    def write(self, key: str, text: str) -> None:
        self.folder.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.folder, prefix=".", delete=False) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files for the owner alone; replicas may run as another user.
        Path(file.name).chmod(0o644)
        Path(file.name).replace(self.folder / f"{key}.json")

    def drop(self, key: str) -> None:
        (self.folder / f"{key}.json").unlink()

"""Kept image files, each once under its SHA-256, however many items show it."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from serve.gallery.log import sync_folder, write_file


class Images:
    """Image files in a folder.

    Args:
        folder: made when the first image comes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._uses: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._uses)

    def write(self, files: Iterable[bytes | None]) -> list[str | None]:
        """SHA-256 of each file, which is on the disk when this returns; None for None.

        Raises:
            OSError: the disk is full or fails.
        """
        digests: list[str | None] = []
        folders: set[Path] = set()
        for data in files:
            digest = None if data is None else hashlib.sha256(data).hexdigest()
            digests.append(digest)
            if data is None or digest is None or self._uses[digest]:
                continue
            path = self._path(digest)
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True)
                folders |= {self._folder, self._folder.parent}
            self._uses[digest] = 0  # until an item shows it, `drop_unused` deletes it
            write_file(path, [data])
            folders.add(path.parent)
        for folder in folders:
            sync_folder(folder)
        return digests

    def read(self, digest: str) -> bytes | None:
        """The file; None when it was dropped meanwhile."""
        try:
            return self._path(digest).read_bytes()
        except FileNotFoundError:
            return None

    def count(self, used: Iterable[str | None], unused: Iterable[str | None] = ()) -> None:
        """Counts items that came, and those that went."""
        self._uses.update(digest for digest in used if digest is not None)
        self._uses.subtract(digest for digest in unused if digest is not None)

    def drop_unused(self) -> None:
        """Deletes what no item shows any more."""
        for digest in [digest for digest, uses in self._uses.items() if uses <= 0]:
            self._path(digest).unlink(missing_ok=True)
            del self._uses[digest]

    def drop_unknown(self) -> None:
        """Deletes files that a crash left behind before any item showed them."""
        for path in self._folder.glob("*/*"):
            if path.name not in self._uses:
                path.unlink()

    def _path(self, digest: str) -> Path:
        return self._folder / digest[:2] / digest

"""People's own images: a folder a class, or a CSV that says which file is of which class and split."""

import csv
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from dml.config import DataConfig
from dml.data.images import FORMATS, ImageError, probe
from dml.data.imageset import Collection, DataError, Files, ImageSet, digest
from dml.data.splits import SPLITS
from dml.names import unknown

_SHOWN = 5  # files or rows named in an error
_COLUMNS = ("path", "label", "split")


def image_folder(config: DataConfig) -> Collection:
    """The images under config.root: a folder a class (searched in depth), or what config.split_csv lists.

    Hidden files, and in folders files whose extension is no image's, are passed over. The header of every file is
    read once, so that what is no image is known before training.

    Raises:
        DataError: no root, no class folders or no images; a faulty row of the CSV; files that are no images.
    """
    if config.root is None:
        raise DataError("image_folder needs data.root: the folder that holds one folder of images a class")
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise DataError(f"data.root: {root} is not a folder")
    if config.split_csv is None:
        files, assigned = _walk(root), None
    else:
        files, assigned = _read_csv(Path(config.split_csv).expanduser(), root)
    sizes = _probe_all(files, config.threads)
    classes = tuple(sorted({label for label, _ in files}))
    label_of = {name: label for label, name in enumerate(classes)}
    source = Files(
        tuple(path for _, path in files), tuple(label for label, _ in files), config.channels, config.threads
    )
    labels_N = np.array([label_of[label] for label, _ in files], dtype=np.int64)
    identity = digest(*(f"{os.path.relpath(path, root)}:{size}" for (_, path), size in zip(files, sizes, strict=True)))
    return Collection(labels_N, classes, source, identity, assigned)


def listed(paths: Sequence[str], root: Path, config: DataConfig) -> ImageSet:
    """These images, in this order, all of one nameless class.

    Args:
        paths: of image files, absolute or relative to root.
        root: a folder.
        config: channels and threads.

    Raises:
        DataError: a file is missing or no image.
    """
    files = [("", root / path) for path in paths]
    missing = [str(path) for _, path in files if not path.is_file()]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise DataError(f"there is no such image: {', '.join(missing[:_SHOWN])}{more}")
    _probe_all(files, config.threads)
    source = Files(tuple(path for _, path in files), tuple(paths), config.channels, config.threads)
    return ImageSet(np.zeros(len(files), dtype=np.int64), ("",), source, np.arange(len(files)))


def _walk(root: Path) -> list[tuple[str, Path]]:
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise DataError(f"data.root: {root} holds no folders; it needs one folder of images a class")
    known = extensions()
    files: list[tuple[str, Path]] = []
    empty: list[str] = []
    for folder in folders:
        found = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in known
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )
        files += [(folder.name, path) for path in found]
        if not found:
            empty.append(folder.name)
    if empty:
        raise DataError(
            f"data.root: {len(empty)} of {len(folders)} class folders under {root} hold no image: "
            f"{_first([repr(name) for name in empty])}; known extensions: {', '.join(sorted(known))}"
        )
    return files


def extensions() -> set[str]:
    """Endings of file names, such as .jpg, that images have."""
    return {extension for extension, name in Image.registered_extensions().items() if name in FORMATS}


def _read_csv(path: Path, root: Path) -> tuple[list[tuple[str, Path]], dict[str, str]]:
    if not path.is_file():
        raise DataError(f"data.split_csv: {path} is not a file")
    with path.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines)
        try:
            return _read(reader, path, root)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not a CSV file in UTF-8 after row {reader.line_num} ({error})") from error


def _read(reader: "csv.DictReader[str]", path: Path, root: Path) -> tuple[list[tuple[str, Path]], dict[str, str]]:
    files: list[tuple[str, Path]] = []
    assigned: dict[str, str] = {}
    row_of_file: dict[Path, int] = {}
    row_of_class: dict[str, int] = {}
    missing = [name for name in _COLUMNS if name not in (reader.fieldnames or [])]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)}; needs the header path,label,split")
    for row in reader:
        where = f"{path}, row {reader.line_num}"
        file, label, split = _cells(row, where)
        file = root / file
        if not file.is_file():
            raise DataError(f"{where}: no file {file}")
        if file in row_of_file:
            raise DataError(f"{where}: {file} was already listed in row {row_of_file[file]}")
        if assigned.setdefault(label, split) != split:
            raise DataError(
                f"{where}: class {label!r} is in {split} here and in {assigned[label]} in row "
                f"{row_of_class[label]}; a class belongs to one split"
            )
        row_of_class.setdefault(label, reader.line_num)
        row_of_file[file] = reader.line_num
        files.append((label, file))
    if not files:
        raise DataError(f"{path}: lists no images")
    return files, assigned


def _cells(row: dict[str, str | None], where: str) -> tuple[Path, str, str]:
    file, label, split = ((row[name] or "").strip() for name in _COLUMNS)
    for name, value in (("path", file), ("label", label)):
        if not value:
            raise DataError(f"{where}: {name} is empty")
    if split not in SPLITS:
        raise DataError(f"{where}: {unknown('split', split, SPLITS)}")
    return Path(file), label, split


def _probe_all(files: Sequence[tuple[str, Path]], threads: int | None) -> list[int]:
    """Sizes of the files in bytes; raises one error for all that are no images."""

    def problem(file: tuple[str, Path]) -> str | None:
        try:
            probe(file[1])
        except ImageError as error:
            return f"class {file[0]!r}: {file[1]}: {error}"
        return None

    with ThreadPoolExecutor(threads) as pool:
        problems = [found for found in pool.map(problem, files) if found]
    if problems:
        raise DataError(f"{len(problems)} of {len(files)} files are no readable images:\n  " + _first(problems, "\n  "))
    return [path.stat().st_size for _, path in files]


def _first(items: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}... and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more

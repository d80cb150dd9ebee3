"""Embeddings of any model, as people bring them: NumPy's .npz files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dml.data.imageset import DataError

Array = npt.NDArray[Any]

KEYS = ("embeddings", "labels", "names", "classes", "gallery_embeddings", "gallery_labels")


@dataclass(frozen=True, eq=False)
class Arrays:
    """What a file of embeddings holds."""

    embeddings_ND: Tensor
    """(N, D) floats, N at least 1."""
    labels_N: Tensor | None
    """(N,) int64, 0..C-1; None where the file has no labels."""
    classes: tuple[str, ...]
    """Names of the classes, by label; those of the gallery included."""
    names: tuple[str, ...] | None
    """Name of each row, for labelled pairs."""
    gallery: tuple[Tensor, Tensor] | None
    """Embeddings (G, D) and labels (G,) to search in, where the rows above are queries."""


def read(path: Path | str) -> Arrays:
    """Reads a .npz file: embeddings (N, D) and, as far as there are any, labels, names, classes and a gallery.

    The keys: embeddings, float16, float32 or float64 (N, D); labels (N,), integers or text; names (N,), text, no two
    alike; classes (C,), names of the integer labels 0..C-1; gallery_embeddings (G, D) with gallery_labels (G,). Pickled
    objects are refused.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: no .npz file, an unknown or missing key, or arrays whose shapes or types do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {key: file[key] for key in file.files}
    except Exception as error:  # of zip, of pickle, of the parser of an array's header
        raise DataError(
            f"{path}: not a .npz file of plain arrays ({error}); write one with "
            "numpy.savez(path, embeddings=..., labels=...)"
        ) from error
    unknown_keys = sorted(set(found) - set(KEYS))
    if unknown_keys or "embeddings" not in found:
        what = f"unknown array {unknown_keys[0]!r}" if unknown_keys else "no array 'embeddings'"
        raise DataError(f"{path}: {what}; valid: {', '.join(KEYS)}")
    if ("gallery_embeddings" in found) != ("gallery_labels" in found):
        raise DataError(f"{path}: gallery_embeddings and gallery_labels go together; one of them is missing")
    embeddings = _embeddings(path, found, "embeddings")
    names = _names(path, found, len(embeddings))
    if "labels" not in found:
        return Arrays(embeddings, None, (), names, None)
    sides = {key: found[key] for key in ("labels", "gallery_labels") if key in found}
    labels, classes = _labels(path, sides, found.get("classes"))
    gallery = None
    if "gallery_labels" in found:
        gallery = (_embeddings(path, found, "gallery_embeddings"), labels["gallery_labels"])
    return Arrays(embeddings, labels["labels"], classes, names, gallery)


def write(path: Path, embeddings_ND: Tensor, labels_N: Tensor, classes: tuple[str, ...]) -> None:
    """Writes a file that `read` reads."""
    np.savez(path, embeddings=embeddings_ND.cpu().numpy(), labels=labels_N.cpu().numpy(), classes=np.array(classes))


def _embeddings(path: Path, found: dict[str, Array], key: str) -> Tensor:
    array = found[key]
    native = array.dtype.newbyteorder("=")  # torch takes no other
    if array.ndim != 2 or not len(array) or native not in (np.float16, np.float32, np.float64):
        raise DataError(
            f"{path}: {key} must be float16, float32 or float64 (N, D) with at least one row, got {array.dtype} of "
            f"shape {array.shape}"
        )
    return torch.from_numpy(array.astype(native, copy=False))


def _names(path: Path, found: dict[str, Array], rows: int) -> tuple[str, ...] | None:
    if "names" not in found:
        return None
    array = found["names"]
    if array.shape != (rows,) or array.dtype.kind != "U":
        raise DataError(f"{path}: names must be text ({rows},), got {array.dtype} of shape {array.shape}")
    names = tuple(array.tolist())
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path}: names must differ, but {twice!r} names {names.count(twice)} rows")
    return names


def _labels(path: Path, sides: dict[str, Array], classes: Array | None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Labels of each side as positions among the classes, and the names of these."""
    for key, array in sides.items():
        if array.ndim != 1 or array.dtype.kind not in "iuU":
            raise DataError(f"{path}: {key} must be integers or text (N,), got {array.dtype} of shape {array.shape}")
    if len({array.dtype.kind == "U" for array in sides.values()}) > 1:
        raise DataError(f"{path}: labels and gallery_labels must both be integers or both be text")
    if classes is not None:
        for key, array in sides.items():
            if array.dtype.kind == "U" or (len(array) and not 0 <= array.min() <= array.max() < len(classes)):
                raise DataError(f"{path}: with classes, {key} must be integers from 0 to {len(classes) - 1}")
        dense = {key: torch.from_numpy(array.astype(np.int64)) for key, array in sides.items()}
        return dense, tuple(map(str, classes.tolist()))
    present, at = np.unique(np.concatenate(list(sides.values())), return_inverse=True)
    parts = torch.from_numpy(at.astype(np.int64)).split([len(array) for array in sides.values()])
    return dict(zip(sides, parts, strict=True)), tuple(map(str, present.tolist()))

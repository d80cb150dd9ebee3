"""Unit rows, and the slow search that every other one must agree with."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from serve.gallery.items import Item

Row = npt.NDArray[np.float32]


def units(count: int, dim: int = 8, seed: int = 0) -> Row:
    """Random directions."""
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clustered(count: int, dim: int = 16, seed: int = 0) -> Row:
    """Rows around a hundred centres, the same for any seed, as classes lie."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((100, dim))
    rows = centres[rng.integers(0, 100, count)] + 0.4 * rng.standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def items(count: int, prefix: str = "item", dim: int = 8, seed: int = 0) -> list[Item]:
    return [Item(f"{prefix}-{number:04d}", row) for number, row in enumerate(units(count, dim, seed))]


def nearest(rows: Mapping[str, Row], query: Row, k: int) -> list[tuple[str, float]]:
    """Ids and Euclidean distances of the k nearest rows, by a loop in float64."""
    found = [(float(np.linalg.norm(row.astype(np.float64) - query)), name) for name, row in rows.items()]
    return [(name, distance) for distance, name in sorted(found)[:k]]

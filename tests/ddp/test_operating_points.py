"""Ranks share the tiles of one grid: operating points and transfer on every rank are those of one process."""

import hashlib
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from dml import gather
from dml.metrics import class_rates, pair_grid
from dml.metrics.operating_points import calibrate
from dml.metrics.pair_distances import pair_distances
from dml.metrics.transfer import transfer
from tests.ddp import ranks


def data(classes: int, samples: int, seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), samples)
    rows = rng.standard_normal((classes, 8))[labels] + 0.6 * rng.standard_normal((len(labels), 8))
    labels[: samples // 2] = 1000  # ragged
    return rows.astype(np.float32), labels


def measure(group: gather.Group | None) -> dict[str, str]:
    """Everything that takes a group, in both forms, with and without a table between classes; in short."""
    rows, labels = data(17, 7, seed=0)
    other, gallery = data(23, 5, seed=1), data(19, 4, seed=2)
    found: dict[str, Any] = {}
    for asked, table in ((None, 512), (None, 3), (gallery, 512)):
        class_rates.TABLE = table
        case = f"gallery {asked is not None}, table {table}"
        points = calibrate(rows, labels, far=(0.1, 0.01), gallery=asked, group=group)
        found |= {f"{case}: {point}": point for point in points}
        found |= {
            f"{case}: transfer of {x.far_target}": x for x in transfer(points, *other, gallery=asked, group=group)
        }
        found[f"{case}: distances"] = pair_distances(rows, labels, gallery=asked, distance="cosine", group=group)
    return {name: digest(x) for name, x in found.items()}


def digest(x: Any) -> str:
    """Equal for equal fields, NaN included, and small enough for a pipe."""
    values = [np.asarray(getattr(x, field.name)).tolist() for field in fields(x)]
    return hashlib.sha256(repr(values).encode()).hexdigest()


def on_rank(rank: int, world: int) -> dict[str, str]:
    pair_grid.TILE = 16
    return measure(gather.default_group())


def test_every_rank_has_what_one_process_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_grid, "TILE", 16)
    monkeypatch.setattr(class_rates, "TABLE", class_rates.TABLE)  # set back afterwards
    alone = measure(None)
    for world in (1, 2, 4):
        assert ranks.run(world, on_rank) == [alone] * world

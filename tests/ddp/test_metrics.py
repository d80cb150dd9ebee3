"""Counts and curves over ranks: the figures of one process, exactly, on every rank."""

import hashlib
from typing import Any

import numpy as np
import pytest

from dml import gather
from dml.metrics import pair_grid, threshold_range
from dml.metrics.pair_counts import PairGrid, count_accepted, positives_histogram, similarity_histograms
from dml.metrics.pair_sample import sampled_negatives
from dml.metrics.threshold import threshold_curves
from tests.ddp import ranks

RANGES: dict[str, Any] = {
    "far": {"far_range": (0.02, 0.2)},
    "sampled far": {"far_range": (0.05, 0.2)},
    "frr": {"frr_range": (0.05, 0.3)},
    "distance": {"distance_range": (0.3, 1.1)},
}


def data(n: int, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 6)).astype(np.float32), rng.integers(0, 20, n)


def measured(group: gather.Group | None) -> dict[str, np.ndarray[Any, Any]]:
    """All that ranks share, on many small tiles, and on fewer tiles than there are ranks."""
    found = {}
    sets = {"one set": (*data(230, 0), None), "gallery": (*data(70, 1), data(190, 2)), "one tile": (*data(20, 3), None)}
    for name, (rows, labels, gallery) in sets.items():
        grid = PairGrid.of(rows, labels, gallery)
        found[f"{name} histograms"] = similarity_histograms(grid, group)
        found[f"{name} positives"] = positives_histogram(grid, group)
        found[f"{name} accepted"] = count_accepted(grid, np.linspace(0.9, -0.5, 7), group)
        if name == "one tile":
            continue
        found[f"{name} sample"] = sampled_negatives(grid, 3000, far=0.1, group=group)
        for kind, choice in RANGES.items():
            threshold_range.SAMPLE = 2000 if kind == "sampled far" else 10_000_000
            threshold_range.SAMPLE_AT_LEAST = 10
            curves = threshold_curves(rows, labels, gallery=gallery, **choice, num_thresholds=11, group=group)
            found[f"{name} {kind}"] = np.stack([*curves.sensitivity_CT, *curves.specificity_CT, curves.thresholds_T])
    return found


def digests(found: dict[str, np.ndarray[Any, Any]]) -> dict[str, str]:
    """Every byte counts, and ranks can send back only so many."""
    return {name: hashlib.sha256(values.tobytes()).hexdigest() for name, values in found.items()}


def on_rank(rank: int, world: int) -> dict[str, str]:
    pair_grid.TILE = 16
    return digests(measured(gather.dist.group.WORLD))


def test_every_rank_has_the_figures_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((pair_grid, "TILE"), (threshold_range, "SAMPLE"), (threshold_range, "SAMPLE_AT_LEAST")):
        monkeypatch.setattr(module, name, getattr(module, name))
    pair_grid.TILE = 16
    alone = measured(None)
    assert len(alone) == 19
    assert all(values.any() for values in alone.values())
    for world in (1, 2, 4):
        for found in ranks.run(world, on_rank):
            assert found == digests(alone)

"""The distances that a replica measured lately, and the metrics that say how they drift.

Search is left out: the nearest of many gallery items is nearer than a pair is, the more so the larger the gallery, so
its distances say nothing about the pairs of a calibration.
"""

from collections import deque
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from dml.metrics.distance_histograms import BINS, bins_of
from dml.metrics.drift import Drift, drift
from dml.metrics.inputs import Counts
from serve.model import Embedder, label

if TYPE_CHECKING:
    import ray.serve.metrics

WINDOW = 10_000
"""Distances that are remembered; older ones are forgotten."""
EVERY = 100
"""Distances from one update of the metrics to the next: fitting the mixture takes about a millisecond."""


class Live:
    """The last WINDOW distances of one model, by bin; for one thread."""

    def __init__(self) -> None:
        self._begin("")

    def see(self, model: Embedder, distance: float) -> None:
        """Counts a Euclidean distance; one of another model than the last begins anew."""
        if label(model) != self._model:
            self._begin(label(model))
        if len(self._window) == WINDOW:
            self._counts_B[self._window.popleft()] -= 1
        self._window.append(int(bins_of(np.array([distance]))[0]))
        self._counts_B[self._window[-1]] += 1
        self.seen += 1
        found = self.against(model) if self.seen % EVERY == 0 else None
        if found is not None:
            for name, value in (("divergence", found.divergence), ("noise", found.noise), ("share", found.share)):
                self._gauges[name].set(value, tags={"model": label(model)})

    def counts_of(self, model: Embedder) -> Counts:
        """(BINS,) the remembered distances of a model: none of one that has measured none since the last change."""
        return self._counts_B if label(model) == self._model else np.zeros(BINS, dtype=np.int64)

    def against(self, model: Embedder) -> Drift | None:
        """Drift from the model's calibration; None without its histograms, or for too few distances."""
        used = model.calibration
        return drift(self.counts_of(model), used.histograms) if used and used.histograms else None

    def _begin(self, model: str) -> None:
        self._model = model
        self._counts_B: Counts = np.zeros(BINS, dtype=np.int64)
        self._window: deque[int] = deque()
        self.seen = 0
        """Distances that were counted, the forgotten too."""

    @cached_property
    def _gauges(self) -> dict[str, "ray.serve.metrics.Gauge"]:
        import ray.serve.metrics

        meant = {
            "divergence": "Jensen-Shannon divergence, in bits, of the live distances from the nearest mixture of the "
            "calibration's positives and negatives.",
            "noise": "About what the divergence is without any drift.",
            "share": "The share of positives in that mixture.",
        }
        return {
            name: ray.serve.metrics.Gauge(f"onethreshold_drift_{name}", text, tag_keys=("model",))
            for name, text in meant.items()
        }

"""What another model has embedded of a gallery, until the gallery changes over to it."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

LEASE_S = 60.0
"""Seconds without a word after which whoever embeds is taken to be gone."""


@dataclass(frozen=True)
class Progress:
    """How far a re-embedding is.

    Attributes:
        model: label of the model that embeds.
        done: images that it has embedded.
        of: images in all.
        trouble: why it does not go on; None while it does.
    """

    model: str
    done: int
    of: int
    trouble: str | None


@dataclass(eq=False)
class Staging:
    """Embeddings by another model; in memory, since they are made again after a restart.

    Attributes:
        model: its label.
        rows: float32 (D,) by SHA-256 of the image.
        trouble: why it does not go on.
    """

    model: str
    rows: dict[str, npt.NDArray[np.float32]]
    trouble: str | None = None
    _heard: float = field(default_factory=time.monotonic)

    @property
    def alive(self) -> bool:
        """Somebody is at it."""
        return self.trouble is None and time.monotonic() - self._heard < LEASE_S

    def add(self, rows: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Holds more embeddings."""
        self.rows |= rows
        self._heard = time.monotonic()

    def end(self, trouble: str | None) -> None:
        """Nobody is at it any more; the rows stay for whoever claims it next."""
        self.trouble, self._heard = trouble and trouble[:500], -math.inf

    def progress(self, images: int) -> Progress:
        """How far it is, of so many images."""
        return Progress(self.model, min(len(self.rows), images), images, self.trouble)

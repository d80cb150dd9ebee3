"""The rule that shares out classes: train, val and test have none in common."""

import hashlib
from collections.abc import Iterable

SPLITS = ("train", "val", "test")


def assign(classes: Iterable[str], *, val_fraction: float, test_fraction: float, seed: int) -> dict[str, str]:
    """The split of each class, by name.

    Classes are ranked by the SHA-256 of "seed/name". The first round(test_fraction * C) are test, the next
    round(val_fraction * C) are val, the rest train. A fraction above 0 gives at least 2 classes, since one class
    alone has no negatives, as long as 2 remain for train. The rule looks at names alone: the order and number of
    images do not matter, and a class keeps its rank when others come or go.
    """
    names = sorted(set(classes), key=lambda name: (_rank(seed, name), name))
    test = _held_out(test_fraction, len(names), spare=len(names) - 2)
    val = _held_out(val_fraction, len(names), spare=len(names) - 2 - test)
    return {
        name: "test" if place < test else "val" if place < test + val else "train" for place, name in enumerate(names)
    }


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()


def _held_out(fraction: float, total: int, *, spare: int) -> int:
    if fraction == 0:
        return 0
    return max(0, min(max(2, round(fraction * total)), spare))

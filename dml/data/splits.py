"""The rule that shares out classes: train, val and test have none in common."""

import hashlib
from collections.abc import Iterable, Mapping

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


def lend(split_of: Mapping[str, str], *, share: float, seed: int) -> dict[str, str]:
    """The split of each class when a share of the val classes trains too.

    Of V val classes those of the last round(share * V) ranks go to train, as long as 2 stay. So what stays with a
    larger share is part of what stays with a smaller one.

    Args:
        split_of: of `assign`, or the split that a dataset brings.
        share: in [0, 1).
        seed: of the rule, also where the dataset brings its split.
    """
    val = [name for name, split in split_of.items() if split == "val"]
    ranked = sorted(val, key=lambda name: (_rank(seed, name), name))
    lent = max(0, min(round(share * len(val)), len(val) - 2))
    return {**split_of, **dict.fromkeys(ranked[len(val) - lent :], "train")}


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogateescape")).digest()


def _held_out(fraction: float, total: int, *, spare: int) -> int:
    if fraction == 0:
        return 0
    return max(0, min(max(2, round(fraction * total)), spare))

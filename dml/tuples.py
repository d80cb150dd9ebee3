"""Tuples (anchor, positive, negative) of a `Pairs`, and what is done to them once they are mined."""

from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from dml.pairs import Pairs

_RHO, _SECOND = 0x72686F, 0x326E64  # streams of draws


class Tuples(NamedTuple):
    """T mined triplets, ordered by anchor.

    Attributes:
        anchor: int64 (T,), rows of this rank.
        positive: int64 (T,), columns of the anchor's class, another sample (after `rho` also the anchor itself).
        negative: int64 (T,), columns of another class (after `rho` also of the anchor's own).
    """

    anchor: Tensor
    positive: Tensor
    negative: Tensor


def rho(pairs: Pairs, tuples: Tuples, p: float) -> Tuples:
    """rho-regularisation: with probability p a tuple (a, p, n) becomes (a, a, p), which pushes its class apart.

    The anchor itself is the positive, the mined positive the negative. Features that tell samples of a class apart are
    then kept; they help on classes never seen.

    Roth et al., Revisiting Training Strategies and Generalization Performance in Deep Metric Learning, ICML 2020,
    arXiv 2002.08473.

    Args:
        pairs: that the tuples were mined from.
        tuples: ordered by anchor.
        p: probability in [0, 1] of each tuple, keyed as the miners' draws are.
    """
    if p == 0:
        return tuples
    anchor, positive, negative = tuples
    switched = _tuple_draws(pairs, _RHO, anchor) < p
    return Tuples(
        anchor,
        torch.where(switched, anchor + pairs.row_offset, positive),
        torch.where(switched, positive, negative),
    )


def second_negative(pairs: Pairs, tuples: Tuples) -> tuple[Tensor, Tensor]:
    """For each tuple a column of a class that is neither the anchor's nor the negative's, drawn uniformly.

    Returns:
        int64 (T,), columns, and bool (T,): False where there is no such class (then the column means nothing).
    """
    blocks = ClassBlocks.of(pairs)
    classes = torch.stack([pairs.row_labels[tuples.anchor], pairs.col_labels[tuples.negative]]).sort(dim=0).values
    starts, counts = blocks.at(classes)
    counts[1] = counts[1].masked_fill(classes[0] == classes[1], 0)
    left = len(blocks.columns) - counts.sum(0)
    # A place among the columns that remain, then past each of the two blocks that lie before it.
    place = (_tuple_draws(pairs, _SECOND, tuples.anchor) * left).long()
    for start, count in zip(starts, counts, strict=True):
        place = place + count * (place >= start)
    return blocks.columns[place.clamp(max=len(blocks.columns) - 1)], left > 0


@dataclass(frozen=True)
class ClassBlocks:
    """The columns that count, sorted by class, so that each class is a range of places.

    Attributes:
        columns: int64 (V,), columns, the classes one after the other.
        labels_C: int64 (C,), the classes that have a column, ascending.
        starts_C: int64 (C,), place of each class's first column.
        counts_C: int64 (C,), columns of each class, at least 1.
    """

    columns: Tensor
    labels_C: Tensor
    starts_C: Tensor
    counts_C: Tensor

    @classmethod
    def of(cls, pairs: Pairs) -> Self:
        """The blocks of a Pairs, the same on every rank."""
        columns = pairs.col_labels.argsort(stable=True)
        if pairs.counted is not None:
            columns = columns[pairs.counted[columns]]
        labels_C, counts_C = pairs.col_labels[columns].unique_consecutive(return_counts=True)
        return cls(columns, labels_C, counts_C.cumsum(0) - counts_C, counts_C)

    def at(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Start and count of the blocks of these classes, each of which has a column; of the same shape."""
        block = torch.searchsorted(self.labels_C, labels.contiguous())
        return self.starts_C[block], self.counts_C[block]


def _tuple_draws(pairs: Pairs, stream: int, anchor_T: Tensor) -> Tensor:
    """One uniform draw a tuple, float64 (T,), that depends on its anchor and its place among the anchor's tuples."""
    counts_B = anchor_T.bincount(minlength=len(pairs.rows))
    place_T = torch.arange(len(anchor_T), device=anchor_T.device) - (counts_B.cumsum(0) - counts_B)[anchor_T]
    most = int(counts_B.max()) if len(counts_B) else 0
    return pairs.draws(stream, most)[anchor_T, place_T]

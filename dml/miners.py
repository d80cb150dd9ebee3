"""Miners: which (anchor, positive, negative) of a `Pairs` a tuple loss looks at. MINERS names them all.

`miner(pairs) -> Tuples`. Anchors are this rank's rows; positives and negatives are columns, of all ranks and of the
memory. What is drawn depends on (seed, step, global row) alone, so W ranks mine together what one would. Distance is
Euclidean, d = sqrt(2 - 2 s).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dml.pairs import Pairs
from dml.tuples import ClassBlocks, Tuples

_POSITIVE, _NEGATIVE = 0x706F73, 0x6E6567  # streams of draws

Miner = Callable[[Pairs], Tuples]


class Random:
    """One tuple an anchor: a positive and a negative, each drawn uniformly from all of the anchor's."""

    def __call__(self, pairs: Pairs) -> Tuples:
        """The tuples of this rank's rows; an anchor without a positive or a negative has none."""
        return _one_an_anchor(pairs, pairs.positives, pairs.negatives)


@dataclass(frozen=True)
class SemiHard:
    """One tuple a positive pair: a negative drawn uniformly from those with d(a, p) < d(a, n) < d(a, p) + margin.

    A positive pair without such a negative has no tuple.

    Schroff, Kalenichenko and Philbin, FaceNet, CVPR 2015, arXiv 1503.03832.

    Attributes:
        margin: width of the band, a distance > 0.
    """

    margin: float = 0.2

    def __call__(self, pairs: Pairs) -> Tuples:
        """The tuples of this rank's rows."""
        s = pairs.similarity.detach()
        positive_BK, present_BK = _table(pairs.positives)
        near_BK = s.gather(1, positive_BK)
        far_BK = 1 - ((2 - 2 * near_BK).clamp(min=0).sqrt() + self.margin) ** 2 / 2
        # Sorted once, the band of every positive is a range of places.
        sorted_BN, columns_BN = s.masked_fill(~pairs.negatives, -torch.inf).sort(dim=1)
        first_BK = torch.searchsorted(sorted_BN, far_BK, right=True)
        count_BK = torch.searchsorted(sorted_BN, near_BK) - first_BK
        draws_BK = pairs.draws(_NEGATIVE, positive_BK.shape[1])
        place_BK = first_BK + (draws_BK * count_BK.clamp(min=0)).long()
        negative_BK = columns_BN.gather(1, place_BK.clamp(max=s.shape[1] - 1))
        return _tuples(positive_BK, negative_BK, present_BK & (count_BK > 0))


class SoftHard:
    """One tuple an anchor, from pairs that are in the wrong order.

    The positive is drawn uniformly from those farther away than the nearest negative, the negative from those nearer
    than the farthest positive. An anchor whose positives are all nearer than its negatives has no tuple.

    Roth and Brattoli, Easily Usable Batch Mining for Metric Learning, 2019; as in Roth et al., ICML 2020, arXiv
    2002.08473, but there an anchor without such pairs draws from all.
    """

    def __call__(self, pairs: Pairs) -> Tuples:
        """The tuples of this rank's rows."""
        return _one_an_anchor(pairs, *_violating(pairs, slack=0.0))


class Hardest:
    """One tuple an anchor: its farthest positive and its nearest negative; nothing is drawn.

    Hermans, Beyer and Leibe, In Defense of the Triplet Loss for Person Re-Identification, 2017, arXiv 1703.07737.
    """

    def __call__(self, pairs: Pairs) -> Tuples:
        """The tuples of this rank's rows; an anchor without a positive or a negative has none."""
        s = pairs.similarity.detach()
        positive = s.masked_fill(~pairs.positives, torch.inf).argmin(1, keepdim=True)
        negative = s.masked_fill(~pairs.negatives, -torch.inf).argmax(1, keepdim=True)
        both = pairs.positives.any(1, keepdim=True) & pairs.negatives.any(1, keepdim=True)
        return _tuples(positive, negative, both)


@dataclass(frozen=True)
class DistanceWeighted:
    """One tuple a positive pair: a negative drawn with weight 1 / q(d(a, n)), so that all distances are seen.

    q is the density of distances between random points on the unit sphere of the embedding's dimension D,

        log q(d) = (D - 2) log d + (D - 3) / 2 log(1 - d^2 / 4)

    Uniform draws would nearly all lie at sqrt(2). d is clamped from below, which bounds the weight of the few nearest.
    Negatives from the cut-off on weigh 0; an anchor with no other negatives draws uniformly from them.

    Wu, Manmatha, Smola and Krähenbühl, Sampling Matters in Deep Embedding Learning, ICCV 2017, arXiv 1706.07567.

    Attributes:
        nearest: distance that nearer negatives are treated as, in (0, cutoff).
        cutoff: distance from which on negatives are left out, below 2.
    """

    nearest: float = 0.5
    cutoff: float = 1.4

    def __call__(self, pairs: Pairs) -> Tuples:
        """The tuples of this rank's rows."""
        dim, negatives, s = pairs.rows.shape[1], pairs.negatives, pairs.similarity.detach()
        lowest, highest = 1 - self.cutoff**2 / 2, 1 - self.nearest**2 / 2
        near = negatives & (s > lowest)
        s = s.clamp(lowest, highest)
        log_q = (dim - 2) / 2 * (2 - 2 * s).log() + (dim - 3) / 2 * ((1 + s) / 2).log()
        # Relative to the row's heaviest negative: 1 / q overflows at a few hundred dimensions.
        weight = (-log_q).masked_fill(~near, -torch.inf).softmax(dim=1, dtype=torch.float64)
        weight = torch.where(near.any(1, keepdim=True), weight, negatives.double())
        return _one_a_positive(pairs, pairs.positives, weight)


@dataclass(frozen=True)
class MultiSimilarityMiner:
    """One tuple a mined positive, its negative drawn uniformly from the anchor's mined negatives.

    A positive is mined when s < max over negatives + epsilon, a negative when s > min over positives - epsilon.

    Wang et al., Multi-Similarity Loss with General Pair Weighting, CVPR 2019, arXiv 1904.06627.

    Attributes:
        epsilon: slack on the cosine similarity, >= 0.
    """

    epsilon: float = 0.1

    def __call__(self, pairs: Pairs) -> Tuples:
        """The tuples of this rank's rows."""
        positives, negatives = _violating(pairs, slack=self.epsilon)
        return _one_a_positive(pairs, positives, negatives.double())


class NPairMiner:
    """One positive an anchor, drawn uniformly, with one negative of every other class, drawn uniformly from it.

    Sohn, Improved Deep Metric Learning with Multi-class N-pair Loss Objective, NeurIPS 2016. There a class has one
    anchor and all anchors share the negatives; here every row is an anchor with negatives of its own.
    """

    def __call__(self, pairs: Pairs) -> Tuples:
        """The tuples of this rank's rows; an anchor without a positive has none."""
        blocks = ClassBlocks.of(pairs)
        draws_BC = pairs.draws(_NEGATIVE, len(blocks.labels_C))
        negative_BC = blocks.columns[blocks.starts_C + (draws_BC * blocks.counts_C).long()]
        positive_B1, has_B1 = _pick(pairs.positives.double(), pairs.draws(_POSITIVE, 1))
        others_BC = pairs.row_labels[:, None] != blocks.labels_C
        return _tuples(positive_B1.expand_as(negative_BC), negative_BC, has_B1 & others_BC)


MINERS: dict[str, Callable[[], Miner]] = {
    "random": Random,
    "semihard": SemiHard,
    "softhard": SoftHard,
    "hardest": Hardest,
    "distance_weighted": DistanceWeighted,
    "multi_similarity": MultiSimilarityMiner,
    "n_pair": NPairMiner,
}


def _one_an_anchor(pairs: Pairs, positives: Tensor, negatives: Tensor) -> Tuples:
    """A positive and a negative of each row, drawn uniformly from the chosen ones, bool (B, N)."""
    positive_B1, has_positive_B1 = _pick(positives.double(), pairs.draws(_POSITIVE, 1))
    negative_B1, has_negative_B1 = _pick(negatives.double(), pairs.draws(_NEGATIVE, 1))
    return _tuples(positive_B1, negative_B1, has_positive_B1 & has_negative_B1)


def _one_a_positive(pairs: Pairs, positives: Tensor, weight: Tensor) -> Tuples:
    """Each of the chosen positives, bool (B, N), with a negative drawn by weight, float64 (B, N)."""
    positive_BK, present_BK = _table(positives)
    negative_BK, has_BK = _pick(weight, pairs.draws(_NEGATIVE, positive_BK.shape[1]))
    return _tuples(positive_BK, negative_BK, present_BK & has_BK)


def _violating(pairs: Pairs, slack: float) -> tuple[Tensor, Tensor]:
    """Pairs that are not in order by more than the slack, positives and negatives: bool (B, N) each.

    Positives less similar than the nearest negative plus slack, negatives more similar than the farthest positive minus
    slack; a row has both or neither.
    """
    s = pairs.similarity.detach()
    nearest_negative = s.masked_fill(~pairs.negatives, -torch.inf).amax(1, keepdim=True)
    farthest_positive = s.masked_fill(~pairs.positives, torch.inf).amin(1, keepdim=True)
    return pairs.positives & (s < nearest_negative + slack), pairs.negatives & (s > farthest_positive - slack)


def _pick(weight_BN: Tensor, draws_BK: Tensor) -> tuple[Tensor, Tensor]:
    """For each draw a column, int64 (B, K), with probability in proportion to its weight; bool (B, K): row has any."""
    cumulative_BN = weight_BN.cumsum(1)
    total_B1 = cumulative_BN[:, -1:]
    columns_BK = torch.searchsorted(cumulative_BN, draws_BK * total_B1, right=True)
    return columns_BK.clamp(max=weight_BN.shape[1] - 1), (total_B1 > 0).expand_as(draws_BK)


def _table(chosen_BN: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen columns of each row side by side, int64 (B, K), and bool (B, K): whether there is one (else 0)."""
    rows, columns = chosen_BN.nonzero(as_tuple=True)
    counts_B = chosen_BN.sum(1)
    places = torch.arange(len(rows), device=rows.device) - (counts_B.cumsum(0) - counts_B)[rows]
    most = int(counts_B.max()) if len(counts_B) else 0
    table_BK = columns.new_zeros(len(chosen_BN), most)
    table_BK[rows, places] = columns
    return table_BK, torch.arange(most, device=rows.device) < counts_B[:, None]


def _tuples(positive_BK: Tensor, negative_BK: Tensor, kept_BK: Tensor) -> Tuples:
    return Tuples(kept_BK.nonzero()[:, 0], positive_BK[kept_BK], negative_BK[kept_BK])

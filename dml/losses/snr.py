"""Contrastive loss on the signal-to-noise ratio."""

from torch import Tensor

from dml.losses.loss import TupleLoss, mean_of_violations
from dml.pairs import Pairs


class SNRContrastive(TupleLoss):
    """Contrastive loss whose distance is the variance of the difference, relative to that of the anchor.

    With snr(a, x) = var(a - x) / var(a), variances over the D entries of an embedding,

        mean of (snr - margin_pos) over positive pairs with snr > margin_pos
      + mean of (margin_neg - snr) over negative pairs with snr < margin_neg
      + weight_mean * mean over anchors of |sum of the entries of a|

    over all pairs of the global batch or, with a miner, over the pairs (a, p) and (a, n) of its tuples. The last term
    keeps embeddings centred, as the paper's distance supposes; between centred unit vectors snr is d^2 = 2 - 2 s.

    Yuan, Deng, Tang, Tang and Chen, Signal-to-Noise Ratio: A Robust Distance Metric for Deep Metric Learning, CVPR
    2019, arXiv 1904.02616. Roth et al., ICML 2020, use the triplet form with margin 0.2; weight_mean is theirs.

    Args:
        margin_pos: ratio >= 0 within which positives are let be.
        margin_neg: ratio >= 0 beyond which negatives are let be.
        weight_mean: factor >= 0 on the last term.
        miner: None takes all pairs.
        rho: as TupleLoss; needs a miner.
    """

    default_miner = None

    def __init__(
        self,
        margin_pos: float = 0.0,
        margin_neg: float = 0.2,
        weight_mean: float = 0.005,
        *,
        miner: str | None = None,
        rho: float = 0.0,
    ) -> None:
        super().__init__(miner, rho)
        for name, value in (("margin_pos", margin_pos), ("margin_neg", margin_neg), ("weight_mean", weight_mean)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value:g}")
        self.margin_pos, self.margin_neg, self.weight_mean = margin_pos, margin_neg, weight_mean

    def forward(self, pairs: Pairs) -> Tensor:
        """The loss over the global batch by the gradient rule, a scalar."""
        s, dim = pairs.similarity, pairs.rows.shape[1]
        row_sums, col_sums = pairs.rows.sum(1), pairs.cols.sum(1)
        # var(a - x) = (|a - x|^2 - (sum a - sum x)^2 / D) / (D - 1), and D - 1 cancels in the ratio. A constant vector
        # has no variance; the bound keeps its ratio finite.
        signal_B1 = (1 - row_sums**2 / dim).clamp(min=1e-6)[:, None]
        if self.miner is None:
            ratio = (2 - 2 * s - (row_sums[:, None] - col_sums) ** 2 / dim) / signal_B1
            pull = (ratio - self.margin_pos).masked_fill(~pairs.positives, 0)
            push = (self.margin_neg - ratio).masked_fill(~pairs.negatives, 0)
            anchors = (pairs.positives | pairs.negatives).any(1)
        else:
            anchor, positive, negative = self.tuples(pairs)
            near, far = (
                (2 - 2 * s[anchor, x] - (row_sums[anchor] - col_sums[x]) ** 2 / dim) / signal_B1[anchor, 0]
                for x in (positive, negative)
            )
            pull, push = near - self.margin_pos, self.margin_neg - far
            anchors = anchor.bincount(minlength=len(s)) > 0
        centre = pairs.mean((row_sums.abs() * anchors).sum(), anchors.sum())
        return mean_of_violations(pairs, pull) + mean_of_violations(pairs, push) + self.weight_mean * centre

"""When a training has gone long enough without a better score on val."""

import math


class EarlyStopping:
    """Counts evaluations since the best one.

    Args:
        patience: evaluations in a row without a better score after which training ends; None never ends it.

    Attributes:
        best: the highest score so far; minus infinity before the first.
        waited: evaluations since then. With best all that a resumed training needs.
    """

    def __init__(self, patience: int | None) -> None:
        if patience is not None and patience < 1:
            raise ValueError(f"patience is at least 1 evaluation, got {patience}")
        self.patience = patience
        self.best, self.waited = -math.inf, 0

    def done(self, score: float) -> bool:
        """Takes in the score of an evaluation and says whether training ends; one that is NaN is not better.

        Args:
            score: val/score, higher is better; the same on every rank, so that all end together.
        """
        if score > self.best:
            self.best, self.waited = score, 0
        else:
            self.waited += 1
        return self.exhausted

    @property
    def exhausted(self) -> bool:
        """Whether training has gone on long enough without a better score."""
        return self.patience is not None and self.waited >= self.patience

    def restore(self, best: float | None, waited: int) -> None:
        """Goes on where another stopped.

        Args:
            best: its best; None before its first evaluation.
            waited: its waited.
        """
        self.best, self.waited = -math.inf if best is None else best, waited

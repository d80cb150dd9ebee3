"""What a search looks for, and which trial wins it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dml.config import NonNegative, Section, Unit


class Objective(Section):
    """Score = Recall@1 - weight * sqrt(OPIS), on val classes, both of the same epoch."""

    weight: NonNegative = 1.0
    """w: how much one unit of sqrt(OPIS) is worth in Recall@1. sqrt(OPIS) is in units of utility, at most 0.5."""
    tolerance: Unit = 0.005
    """delta: a winner's Recall@1 may lie this far below the baseline's. OPIS alone would reward collapse."""


@dataclass(frozen=True)
class Outcome:
    """One trial of a search.

    Attributes:
        number: Optuna's number; 0 is the baseline without TCM.
        state: finished, failed or unfinished.
        settings: what was varied, by dotted name.
        metrics: the trial's last report (best/... are of its best epoch); empty when it never reported.
        checkpoint: path or URI of the best epoch's checkpoint.
        seconds: from the trial's start to its end.
        error: why it failed, one line.
    """

    number: int
    state: str
    settings: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    checkpoint: str = ""
    run_id: str = ""
    seconds: float = 0.0
    error: str = ""

    @property
    def recall(self) -> float:
        """Recall@1 on val at the best epoch."""
        return self.metrics["best/recall@1"]

    @property
    def opis(self) -> float:
        """OPIS on val at the best epoch."""
        return self.metrics["best/opis"]

    @property
    def score(self) -> float:
        """Score on val at the best epoch."""
        return self.metrics["best/score"]


def baseline(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The finished trial without TCM; None when it failed."""
    return next((outcome for outcome in outcomes if outcome.number == 0 and outcome.state == "finished"), None)


def winner(outcomes: Sequence[Outcome], tolerance: float) -> Outcome:
    """The best score among finished trials whose Recall@1 is at least the baseline's minus the tolerance.

    The baseline itself can win. Without a finished baseline there is no bound on Recall@1.

    Raises:
        ValueError: no trial finished; the message carries the first failure.
    """
    finished = [outcome for outcome in outcomes if outcome.state == "finished"]
    if not finished:
        first = next((outcome.error for outcome in outcomes if outcome.error), "none ran")
        raise ValueError(f"no trial of {len(outcomes)} finished; the first failure: {first}")
    reference = baseline(finished)
    bound = reference.recall - tolerance if reference is not None else 0.0
    return max((outcome for outcome in finished if outcome.recall >= bound), key=lambda outcome: outcome.score)

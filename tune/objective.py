"""What a search looks for, and which trial wins it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from dml.config import NonNegative, Section, Unit

Mode: TypeAlias = Literal["combined", "constrained", "pareto"]

METRICS: dict[Mode, dict[str, Literal["max", "min"]]] = {
    "combined": {"best/score": "max"},
    "constrained": {"best/opis": "min"},
    "pareto": {"best/recall@1": "max", "best/opis": "min"},
}
"""What Optuna is told of a trial, by mode: figures of its best epoch on val classes, and where they should go."""
RULES: dict[Mode, str] = {
    "combined": "the best Recall@1 - w * sqrt(OPIS)",
    "constrained": "the least OPIS",
    "pareto": "the knee of the front of Recall@1 and OPIS",
}
"""How the winner is chosen among the trials whose Recall@1 is within the tolerance below the baseline's, by mode."""


class Objective(Section):
    """Score = Recall@1 - weight * sqrt(OPIS), on val classes, both of the same epoch."""

    mode: Mode = "combined"
    """combined: the best score. constrained: the least OPIS. pareto: both figures are searched, and the knee of their
    front wins. Each among trials whose Recall@1 is within the tolerance."""
    weight: NonNegative = 1.0
    """w: how much one unit of sqrt(OPIS) is worth in Recall@1. sqrt(OPIS) is in units of utility, at most 0.5."""
    tolerance: Unit = 0.005
    """delta: a winner's Recall@1 may lie this far below the baseline's. OPIS alone would reward collapse."""

    @property
    def metrics(self) -> dict[str, Literal["max", "min"]]:
        """METRICS of this mode."""
        return METRICS[self.mode]


@dataclass(frozen=True)
class Outcome:
    """One trial of a search.

    Attributes:
        number: Optuna's number; 0 is the baseline without TCM.
        state: finished, pruned (stopped early), failed or unfinished.
        settings: what was varied, by dotted name.
        metrics: the trial's last report (best/... are of its best epoch); empty when it never reported.
        checkpoint: path or URI of the best epoch's checkpoint.
        seconds: from the trial's start to its end.
        error: why it failed, one line.
    """

    number: int
    state: str
    settings: Mapping[str, str | int | float | bool | None] = field(default_factory=dict)
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


def violation(recall: float, reference: float, tolerance: float) -> float:
    """How far a Recall@1 lies below the least that can win: an Optuna constraint, kept to where it is at most 0.

    Args:
        recall: Recall@1 of a trial.
        reference: Recall@1 of the baseline.
        tolerance: how far a winner may lie below it.
    """
    return reference - tolerance - recall


def winner(outcomes: Sequence[Outcome], tolerance: float, mode: Mode = "combined") -> Outcome:
    """The trial that RULES choose among finished ones whose Recall@1 is at least the baseline's minus the tolerance.

    The baseline itself can win. Without a finished baseline there is no bound on Recall@1.

    Raises:
        ValueError: no trial finished; the message carries the first failure.
    """
    return ranked(outcomes, tolerance, mode)[0]


def ranked(outcomes: Sequence[Outcome], tolerance: float, mode: Mode = "combined") -> list[Outcome]:
    """The finished trials that can win, best first.

    combined: by the score. constrained: by OPIS. pareto: the knee of the front, then the rest of the front by score,
    then the others by score.

    Raises:
        ValueError: no trial finished; the message carries the first failure.
    """
    finished = [outcome for outcome in outcomes if outcome.state == "finished"]
    if not finished:
        first = next((outcome.error for outcome in outcomes if outcome.error), "none ran")
        raise ValueError(f"no trial of {len(outcomes)} finished; the first failure: {first}")
    reference = baseline(finished)
    able = [
        outcome
        for outcome in finished
        if reference is None or violation(outcome.recall, reference.recall, tolerance) <= 0
    ]
    by_score = sorted(able, key=lambda outcome: -outcome.score)
    if mode == "constrained":
        return sorted(by_score, key=lambda outcome: outcome.opis)
    if mode == "combined":
        return by_score
    best = knee(by_score)
    ahead = {outcome.number for outcome in front(able)}
    return sorted(by_score, key=lambda outcome: (outcome is not best, outcome.number not in ahead))


def front(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The finished trials that no other beats in Recall@1 and OPIS at once, by falling Recall@1."""
    finished = [outcome for outcome in outcomes if outcome.state == "finished"]
    found: list[Outcome] = []
    for outcome in sorted(finished, key=lambda outcome: (-outcome.recall, outcome.opis)):
        if not found or outcome.opis < found[-1].opis:
            found.append(outcome)
    return found


def knee(outcomes: Sequence[Outcome]) -> Outcome:
    """The point of the front farthest beyond the straight line from its one end to its other.

    In Recall@1 and sqrt(OPIS), each measured by how much it changes along the front. A front without an inner point
    beyond that line gives its best score.

    Raises:
        ValueError: no finished trial.
    """
    points = front(outcomes)
    if not points:
        raise ValueError("a front needs a finished trial")
    high, low = points[0], points[-1]
    gained, spread = high.recall - low.recall, math.sqrt(high.opis) - math.sqrt(low.opis)

    def beyond(outcome: Outcome) -> float:
        # 0 at both ends; the shares of Recall@1 kept and of sqrt(OPIS) saved sum to 1 on the line between them.
        kept = (outcome.recall - low.recall) / gained
        saved = (math.sqrt(high.opis) - math.sqrt(outcome.opis)) / spread
        return kept + saved - 1

    inner = [outcome for outcome in points[1:-1] if beyond(outcome) > 0]
    if not inner:
        return max(points, key=lambda outcome: outcome.score)
    return max(inner, key=beyond)

"""The finalists of a search, trained again over seeds: OPIS is noisy, and the best of many trials is lucky.

At one seed every finalist starts from the same weights and sees the same batches: differences are taken seed by seed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TypeAlias

from tune.objective import Mode, Outcome, baseline, ranked, winner
from tune.space import Point

Interval: TypeAlias = tuple[float, float]

MEANS = ("best/recall@1", "best/opis", "best/score", "best/opis_noise_floor", "best/mean_utility")


@dataclass(frozen=True)
class Difference:
    """How far a finalist lies from the baseline in one figure, over paired seeds.

    Attributes:
        mean: finalist minus baseline.
        interval: 95 % interval of it by Student's t; None with fewer than two seeds.
    """

    mean: float
    interval: Interval | None


@dataclass(frozen=True)
class Finals:
    """What the finalists came to.

    Attributes:
        runs: by trial number and seed, those that finished.
        means: an outcome a finalist that finished every seed that the baseline did, its figures the means over these.
        winner: the one of `means` that the search's own rule chooses.
        seeds: those that the means are over.
    """

    runs: Mapping[tuple[int, int], Outcome]
    means: tuple[Outcome, ...]
    winner: Outcome
    seeds: tuple[int, ...]

    def model(self) -> tuple[Outcome, Outcome | None]:
        """The run of the winner to register, its best score over the seeds, and the baseline's of the same seed."""
        seed = max(self.seeds, key=lambda seed: self.runs[self.winner.number, seed].score)
        return self.runs[self.winner.number, seed], self.runs.get((0, seed))

    def difference(self, number: int, metric: str) -> Difference | None:
        """A finalist against the baseline in one metric; None where the baseline did not finish."""
        if (0, self.seeds[0]) not in self.runs:
            return None
        pairs = [(self.runs[number, seed], self.runs[0, seed]) for seed in self.seeds]
        return paired([after.metrics[metric] - before.metrics[metric] for after, before in pairs])


def finalists(outcomes: Sequence[Outcome], count: int, tolerance: float, mode: Mode) -> list[Outcome]:
    """The baseline, where it finished, and so many of the best others by the search's own rule."""
    reference = baseline(outcomes)
    best = [outcome for outcome in ranked(outcomes, tolerance, mode) if outcome.number != 0][:count]
    return best if reference is None else [reference, *best]


def points(chosen: Sequence[Outcome], seeds: Sequence[int]) -> list[Point]:
    """The trials that the finals run, seed by seed."""
    return [{**outcome.settings, "number": outcome.number, "train.seed": seed} for seed in seeds for outcome in chosen]


def judge(outcomes: Sequence[Outcome], tolerance: float, mode: Mode) -> Finals:
    """Takes the means over the seeds and chooses the winner.

    A seed counts where the baseline finished it, and a finalist takes part that finished all of these. Without any run
    of the baseline the seeds count that every finalist with a run finished.

    Args:
        outcomes: of the trials of `points`.
        tolerance: how far the winner's mean Recall@1 may lie below the baseline's.
        mode: of the search.

    Raises:
        ValueError: no finalist finished; the message carries the first failure.
    """
    runs = {(o.number, int(float(str(o.settings["train.seed"])))): o for o in outcomes if o.state == "finished"}
    numbers = list(dict.fromkeys(number for number, _ in runs))
    by_number = {number: {seed for own, seed in runs if own == number} for number in numbers}
    seeds = by_number.get(0) or set.intersection(*by_number.values() or [set()])
    means = [
        _mean([runs[number, seed] for seed in seeds]) for number in numbers if seeds and seeds <= by_number[number]
    ]
    if not means:
        first = next((outcome.error for outcome in outcomes if outcome.error), "none shares a seed with another")
        raise ValueError(f"no finalist finished; the first failure: {first}")
    return Finals(runs, tuple(means), winner(means, tolerance, mode), tuple(sorted(seeds)))


def paired(differences: Sequence[float]) -> Difference:
    """The mean of paired differences with its 95 % interval by Student's t."""
    from scipy.special import stdtrit  # type: ignore[import-untyped]

    mean, count = fmean(differences), len(differences)
    if count < 2:
        return Difference(mean, None)
    half = float(stdtrit(count - 1, 0.975)) * stdev(differences) / math.sqrt(count)
    return Difference(mean, (mean - half, mean + half))


def _mean(runs: Sequence[Outcome]) -> Outcome:
    first = runs[0]
    return Outcome(
        number=first.number,
        state="finished",
        settings={name: value for name, value in first.settings.items() if name != "train.seed"},
        metrics={name: fmean(run.metrics[name] for run in runs) for name in MEANS if name in first.metrics},
        seconds=sum(run.seconds for run in runs),
    )

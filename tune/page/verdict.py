"""What a search came to in a few sentences, and what speaks against believing it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dml.metrics.opis_interval import Interval, opis_ratio
from tune.finals import Finals
from tune.objective import RULES, Outcome
from tune.page.findings import Findings, described
from tune.ranges import Range
from tune.tested import Tested

NEAR_FLOOR = 2.0
"""An OPIS below so many times its noise floor is mostly the noise of counting few pairs."""
NEAR_EDGE = 0.03
"""A winner within this share of a range of its end lies at the edge of what was searched."""


@dataclass(frozen=True)
class Figures:
    """What models are compared by: Recall@1, OPIS, its noise floor, mean utility and the score."""

    recall: float
    opis: float
    floor: float
    utility: float
    score: float

    @classmethod
    def on_val(cls, outcome: Outcome) -> "Figures":
        """Of a trial's best epoch, or of a finalist's mean."""
        return cls._of(outcome.metrics, "best/")

    @classmethod
    def on_test(cls, tested: Tested) -> "Figures":
        """Of a model on test classes."""
        return cls._of(tested.metrics, "test/")

    @classmethod
    def _of(cls, metrics: Mapping[str, float], prefix: str) -> "Figures":
        names = ("recall@1", "opis", "opis_noise_floor", "mean_utility", "score")
        return cls(*(metrics.get(prefix + name, math.nan) for name in names))


def paragraphs(findings: Findings) -> list[str]:
    """What was searched; what won, and by how much on val; by how much on test."""
    found = (_searched(findings), " ".join(_won(findings)), _on_test(findings))
    return [paragraph for paragraph in found if paragraph]


def doubts(findings: Findings) -> list[str]:
    """What a sceptic would hold against the result, each with what would settle it."""
    if findings.chosen is None:
        return []
    return [*_seeds(findings), *_baseline(findings), *_transfer(findings), *_floor(findings), *_edges(findings)]


def counted(findings: Findings) -> str:
    """How the trials ended, in words."""
    words = (
        ("finished", "finished"),
        ("pruned", "stopped early"),
        ("failed", "failed"),
        ("unfinished", "did not end"),
    )
    counts = [(len(findings.of_state(state)), word) for state, word in words]
    return ", ".join(f"{count} {word}" for count, word in counts if count)


def score(findings: Findings) -> str:
    """The formula of the score with this search's weight."""
    weight = findings.objective.weight
    return f"Recall@1 - {'' if weight == 1 else f'{weight:g} * '}sqrt(OPIS)"


def points(before: float, after: float) -> str:
    """A change of a share in points of percent: +1.18 points."""
    return f"{100 * (after - before):+.2f} points"


def percent(before: float, after: float) -> str:
    """A change in percent of where it began: -12.3 %."""
    return f"{100 * (after / before - 1):+.1f} %" if before else f"{after - before:+.5f}"


def interval_of_opis(findings: Findings) -> Interval | None:
    """The 95 % interval over classes of OPIS on test, winner over baseline; None where it is not defined."""
    before, after = findings.tested_baseline, findings.tested
    if before is None or after is None or before is after or before.curves is None or after.curves is None:
        return None
    return opis_ratio(before.curves, after.curves, findings.config.evaluate.utility_c)[1]


def _searched(findings: Findings) -> str:
    config, trials = findings.config, f"{len(findings.outcomes)} trial{'s' if len(findings.outcomes) > 1 else ''}"
    searched = ", ".join([f"TCM's {_listed(findings.space.tcm)}", *findings.space.others])
    sampler = findings.options.get("sampler")
    by = f" by {sampler}" if sampler else ""
    rule = RULES[findings.objective.mode].replace("Recall@1 - w * sqrt(OPIS)", score(findings))
    return (
        f"{trials} on {config.data.dataset} (encoder {config.encoder.name}, loss {config.loss.name}) searched "
        f"{searched}{by}, for {rule} with Recall@1 at most {100 * findings.objective.tolerance:g} points below the "
        f"baseline, which has no TCM: {counted(findings)}."
    )


def _listed(names: Iterable[str]) -> str:
    *most, last = (name.removeprefix("tcm.") for name in names)
    return f"{', '.join(most)} and {last}" if most else last


def _won(findings: Findings) -> list[str]:
    chosen = findings.chosen
    if chosen is None:
        first = next((outcome.error for outcome in findings.outcomes if outcome.error), "none ran")
        return [f"No trial finished, so nothing was chosen. The first failure: {first}."]
    if chosen.number == 0:
        won = "The baseline without TCM won: nothing that was tried beats it within the tolerance."
    else:
        won = f"Trial {chosen.number} won ({described(chosen, findings.names)})."
    before, after = findings.compared
    if after is None:
        return [won]
    where = "On val classes, by which it was chosen"
    if findings.finals is not None:
        where += f", in the mean over {len(findings.finals.seeds)} new seeds"
    found = [won, f"{where}: {_figures(before, after)}."]
    if findings.finals is not None and chosen.number != 0:
        found += _over_seeds(findings.finals)
    return found


def _figures(before: Outcome | None, after: Outcome) -> str:
    return _compared(None if before is None or before is after else Figures.on_val(before), Figures.on_val(after))


def _compared(before: Figures | None, after: Figures, interval: str = "") -> str:
    recall, opis = f"Recall@1 {after.recall:.4f}", f"OPIS {after.opis:.5f}"
    floor = f"noise floor {after.floor:.5f}"
    if before is None:
        return f"{recall}, {opis} ({floor})"
    return (
        f"{recall}, {points(before.recall, after.recall)} from the baseline's {before.recall:.4f}; {opis}, "
        f"{percent(before.opis, after.opis)} from its {before.opis:.5f} ({interval}{floor})"
    )


def _over_seeds(finals: Finals) -> list[str]:
    recall, opis = (finals.difference(finals.winner.number, f"best/{name}") for name in ("recall@1", "opis"))
    if recall is None or opis is None or recall.interval is None or opis.interval is None:
        return []
    return [
        f"Seed by seed against the baseline, with 95 % intervals over seeds: Recall@1 {100 * recall.mean:+.2f} points "
        f"({_ends(recall.interval, 2, 100)}), OPIS {opis.mean:+.5f} ({_ends(opis.interval, 5)})."
    ]


def _ends(interval: Interval, digits: int, scale: float = 1.0) -> str:
    low, high = (f"{scale * end:+.{digits}f}" for end in interval)
    return f"{low} to {high}"


def _on_test(findings: Findings) -> str:
    before, after = findings.tested_baseline, findings.tested
    if after is None:
        return "" if findings.chosen is None else "The winner has not been measured on test classes."
    found = interval_of_opis(findings)
    interval = ""
    if found is not None:
        low, high = (100 * (end - 1) for end in found)
        interval = f"95 % interval over classes {low:+.1f} to {high:+.1f} %, "
    same = None if before is None or before is after else Figures.on_test(before)
    words = _compared(same, Figures.on_test(after), interval)
    return f"On {after.classes} test classes, which no choice has seen: {words}."


def _seeds(findings: Findings) -> list[str]:
    finals, chosen = findings.finals, findings.chosen
    if finals is None:
        if len(findings.finished) < 2:
            return []
        return [
            f"One seed decided. The best of {len(findings.finished)} trials is in part the luckiest, and OPIS differs "
            "between seeds; --seeds 5 trains the finalists and the baseline again over new seeds."
        ]
    if chosen is None or chosen.number == 0:
        return []
    if len(finals.seeds) < 2:
        return ["One new seed gives no interval; --seeds 5 gives one."]
    found = []
    for name, figure in (("Recall@1", "recall@1"), ("OPIS", "opis")):
        difference = finals.difference(finals.winner.number, f"best/{figure}")
        if difference is not None and difference.interval is not None and _holds_zero(difference.interval):
            found.append(
                f"Over {len(finals.seeds)} seeds the change of {name} may be none: its 95 % interval on val holds 0."
            )
    return found


def _baseline(findings: Findings) -> list[str]:
    found = []
    if findings.baseline is None:
        found.append("The baseline did not finish: nothing shows that TCM helps, and no bound held Recall@1.")
    if findings.toy:
        found.append("Val or test holds two classes, a toy: OPIS over them says little.")
    failed = len(findings.of_state("failed"))
    if 4 * failed >= len(findings.outcomes):
        found.append(f"{failed} of {len(findings.outcomes)} trials failed; the table gives each one's cause.")
    return found


def _transfer(findings: Findings) -> list[str]:
    before, after = findings.compared
    tested_before, tested = findings.tested_baseline, findings.tested
    if before is None or after is None or before is after or tested is None or tested_before is None:
        return []
    found = []
    old, new = Figures.on_val(before), Figures.on_val(after)
    tested_old, tested_new = Figures.on_test(tested_before), Figures.on_test(tested)
    lost, tolerance = tested_old.recall - tested_new.recall, findings.objective.tolerance
    if lost > tolerance:
        found.append(
            f"On test its Recall@1 lies {100 * lost:.2f} points below the baseline's, more than the tolerance of "
            f"{100 * tolerance:g} that it kept to on val."
        )
    if tested_new.opis > tested_old.opis:
        word = "larger, though it is smaller on val" if new.opis < old.opis else "larger, as on val"
        found.append(f"On test its OPIS is not better than the baseline's but {word}.")
    interval = interval_of_opis(findings)
    if interval is not None and interval[0] <= 1 <= interval[1]:
        found.append(
            "On test the change of OPIS may come from these very classes: its 95 % interval over classes holds 0."
        )
    return found


def _floor(findings: Findings) -> list[str]:
    after = findings.tested
    figures = None if after is None else Figures.on_test(after)
    where = "test"
    if figures is None and findings.chosen is not None:
        figures, where = Figures.on_val(findings.chosen), "val"
    if figures is None or not figures.opis < NEAR_FLOOR * figures.floor:
        return []
    return [
        f"The winner's OPIS on {where} is {figures.opis / figures.floor:.1f} times its noise floor, what equal classes "
        "would show with this many pairs at least: of what is left to gain, much is noise. More samples a class lower "
        "the floor."
    ]


def _edges(findings: Findings) -> list[str]:
    chosen = findings.chosen
    if chosen is None or chosen.number == 0:
        return []
    found = []
    for name, values in findings.space.ranges.items():
        value = chosen.settings.get(name)
        if not isinstance(values, Range) or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        scale = math.log if values.kind == "log" else float
        share = (scale(value) - scale(values.low)) / (scale(values.high) - scale(values.low))
        # An end at 0 or 1 is often where the setting itself ends.
        if values.kind != "int" and min(share, 1 - share) < NEAR_EDGE and value not in (0, 1):
            found.append(
                f"The winner's {name} {value:.3g} lies at the edge of {values}; a wider --space may hold better ones."
            )
    return found


def _holds_zero(interval: Interval) -> bool:
    return interval[0] <= 0 <= interval[1]

"""The tables of a search's page, as plain text."""

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass

from tune import report
from tune.finals import Difference
from tune.objective import Outcome
from tune.page.findings import Findings, shown, value_of
from tune.page.verdict import Figures, percent, points, score


@dataclass(frozen=True)
class Table:
    """A table as text; its first column names the rows.

    Attributes:
        key: its id on the page.
        caption: what it holds.
        head: names of the columns.
        rows: cells, as many a row as there are names.
        words: columns of words, which are aligned left; the others hold figures.
        marked: rows that stand out.
    """

    key: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: frozenset[int] = frozenset()
    marked: frozenset[int] = frozenset()


def comparisons(findings: Findings) -> list[Table]:
    """Baseline beside winner, on val and on test."""
    found = []
    before, after = findings.compared
    if after is not None:
        reference = None if before is None or before is after else Figures.on_val(before)
        seeds = "" if findings.finals is None else f", means over {len(findings.finals.seeds)} seeds"
        caption = f"Val classes, by which it was chosen{seeds}"
        found.append(_table("val", caption, reference, Figures.on_val(after)))
    tested = findings.tested
    if tested is not None:
        base = findings.tested_baseline
        reference = None if base is None or base is tested else Figures.on_test(base)
        caption = f"{tested.classes} test classes, seen once"
        found.append(_table("test", caption, reference, Figures.on_test(tested)))
    return found


def finals(findings: Findings) -> Table | None:
    """The finalists over seeds with their changes from the baseline; None without finals."""
    over = findings.finals
    if over is None:
        return None
    rows = []
    for outcome in over.means:
        number, floor = outcome.number, outcome.metrics.get("best/opis_noise_floor", math.nan)
        recall, opis, score = (
            None if number == 0 else over.difference(number, f"best/{name}") for name in ("recall@1", "opis", "score")
        )
        rows.append(
            (
                f"{number}{' (baseline)' if number == 0 else ''}{' (winner)' if outcome is over.winner else ''}",
                *(f"{outcome.recall:.4f}", _change(recall, 2, 100)),
                *(f"{outcome.opis:.5f}", _change(opis, 5), _figure(floor, 5)),
                *(f"{outcome.score:.4f}", _change(score, 4)),
            )
        )
    head = ("Trial", "Recall@1", "change, points", "OPIS", "change", "noise floor", "Score", "change")
    caption = (
        f"Finalists on val classes: means over {len(over.seeds)} new seeds, and changes from the baseline with half of "
        "their 95 % intervals over seeds"
    )
    marked = frozenset(index for index, outcome in enumerate(over.means) if outcome is over.winner)
    return Table("finals", caption, head, tuple(rows), marked=marked)


def trials(findings: Findings) -> Table:
    """Every trial: those that can win by rank, then the other finished ones, then the rest by number."""
    judged = findings.judged
    able = {outcome.number for outcome in judged}
    below = [outcome for outcome in findings.finished if outcome.number not in able]
    rest = sorted((o for o in findings.outcomes if o.state != "finished"), key=lambda outcome: outcome.number)
    ordered = [*judged, *sorted(below, key=lambda outcome: -outcome.score), *rest]
    names = findings.names
    rows = []
    for place, outcome in enumerate(ordered, 1):
        rank = str(place) if outcome.number in able and outcome.state == "finished" else ""
        settings = [_cell(findings, outcome, name) for name in names]
        rows.append((str(outcome.number), _state(outcome, findings.chosen, able), rank, *settings, *_results(outcome)))
    head = (
        *("Trial", "State", "Rank", *(name.removeprefix("tcm.") for name in names)),
        *("Recall@1", "OPIS", "noise floor", "mean utility", "Score", "seconds"),
    )
    marked = frozenset(index for index, outcome in enumerate(ordered) if outcome is findings.chosen)
    caption = (
        f"Trials on val classes, ranked by the search's rule. Score is {score(findings)}; figures are of "
        "the best epoch, where a trial did not finish the best until then"
    )
    return Table("all-trials", caption, head, tuple(rows), frozenset({1}), marked)


def _table(key: str, caption: str, before: Figures | None, after: Figures) -> Table:
    old = before or after
    rows = (
        ("Recall@1", 4, old.recall, after.recall, points(old.recall, after.recall)),
        ("OPIS", 5, old.opis, after.opis, percent(old.opis, after.opis)),
        ("sqrt(OPIS)", 4, old.opis**0.5, after.opis**0.5, percent(old.opis**0.5, after.opis**0.5)),
        # The floor says how far to trust the lines above; less is not better.
        ("OPIS noise floor", 5, old.floor, after.floor, ""),
        ("mean utility", 4, old.utility, after.utility, percent(old.utility, after.utility)),
        ("score", 4, old.score, after.score, f"{after.score - old.score:+.4f}"),
    )
    if before is None:
        alone = tuple((name, _figure(new, digits)) for name, digits, _, new, _ in rows)
        return Table(key, caption, ("Figure", "winner"), alone)
    both = tuple((name, _figure(was, digits), _figure(new, digits), change) for name, digits, was, new, change in rows)
    return Table(key, caption, ("Figure", "baseline", "winner", "change"), both)


def _cell(findings: Findings, outcome: Outcome, name: str) -> str:
    if name.startswith("tcm."):
        value = value_of(outcome, name)
        return "" if value is None else shown(value)
    # The baseline keeps to the recipe where that lies outside of what is searched.
    return shown(outcome.settings.get(name, findings.config.flat.get(name)))


def _results(outcome: Outcome) -> Sequence[str]:
    names = (("recall@1", 4), ("opis", 5), ("opis_noise_floor", 5), ("mean_utility", 4), ("score", 4))
    figures = [_figure(outcome.metrics.get(f"best/{name}", math.nan), digits) for name, digits in names]
    return [*figures, f"{outcome.seconds:.0f}" if outcome.seconds else ""]


def _state(outcome: Outcome, chosen: Outcome | None, able: Set[int]) -> str:
    words = {"pruned": "stopped early", "unfinished": "did not end"}.get(outcome.state, outcome.state)
    if outcome.error:
        words += f": {outcome.error}"
    elif outcome.state == "finished" and outcome.number not in able:
        words += ", Recall@1 below the bound"
    marks = ["winner"] * (outcome is chosen) + ["baseline"] * (outcome.number == 0)
    return " ".join([words, f"({', '.join(marks)})"] if marks else [words])


def _change(found: Difference | None, digits: int, scale: float = 1.0) -> str:
    return report.change(found, digits, scale=scale).replace("+-", "±")


def _figure(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else ""

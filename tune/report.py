"""The end of a search, as a person reads it: the table of trials and the test classes."""

from collections.abc import Mapping, Sequence

import rich.box
import rich.console
import rich.table

from tune.finals import Difference, Finals
from tune.objective import Outcome
from tune.tested import Tested

TOY = "toy: two val and two test classes say little about OPIS"


def print_trials(outcomes: Sequence[Outcome], winner: Outcome) -> None:
    """Ranks the trials by score; the winner and the baseline are marked."""
    table = rich.table.Table(
        title="Trials by score on val classes (Recall@1 - w * sqrt(OPIS), best epoch)",
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("rank", "trial", "margin+", "margin-", "weight", "start"):
        table.add_column(name, justify="right", min_width=len(name))
    for name in ("Recall@1", "   OPIS", "  floor", "mean U", " score", "seconds"):
        table.add_column(name, justify="right", min_width=len(name))
    table.add_column("", min_width=len("winner, baseline"))
    ranked = sorted((o for o in outcomes if o.state == "finished"), key=lambda outcome: -outcome.score)
    for rank, outcome in enumerate(ranked, 1):
        names = ("margin_pos", "margin_neg", "weight", "start")
        settings = [outcome.settings.get(f"tcm.{name}") for name in names]
        if outcome.settings.get("tcm.weight") == 0:
            settings = [None] * 4
        table.add_row(
            str(rank),
            str(outcome.number),
            *(
                "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
                for value in settings
            ),
            f"{outcome.recall:.4f}",
            f"{outcome.opis:.5f}",
            f"{outcome.metrics['best/opis_noise_floor']:.5f}",
            f"{outcome.metrics['best/mean_utility']:.4f}",
            f"{outcome.score:.4f}",
            f"{outcome.seconds:.0f}",
            ", ".join(["winner"] * (outcome is winner) + ["baseline"] * (outcome.number == 0)),
            style="bold" if outcome is winner else None,
        )
    # Whole figures, if need be on broken lines: a cut one says nothing.
    rich.console.Console(width=max(rich.console.Console().width, 116)).print(table)
    for outcome in outcomes:
        if outcome.state == "failed":
            print(f"trial {outcome.number} failed: {outcome.error}")
        elif outcome.state == "pruned":
            print(f"trial {outcome.number} was stopped early, at score {outcome.score:.4f}")


def print_front(front: Sequence[Outcome]) -> None:
    """The trials that no other beats in both figures."""
    print("Pareto front on val classes, by Recall@1:")
    for outcome in front:
        mark = "  baseline" if outcome.number == 0 else ""
        print(f"  trial {outcome.number:3}  Recall@1 {outcome.recall:.4f}  OPIS {outcome.opis:.5f}{mark}")


def print_finals(finals: Finals) -> None:
    """The finalists' means over the seeds, and how far each lies from the baseline with its 95 % interval."""
    table = rich.table.Table(
        title=f"Finalists on val classes, means over {len(finals.seeds)} new seeds; change from the baseline +- 95 %",
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
    )
    for name in ("trial", "Recall@1", "points", "OPIS", "change", "score", "change", ""):
        table.add_column(name, justify="right" if name else "left")
    for outcome in finals.means:
        number = outcome.number
        recall, opis, score = (
            None if number == 0 else finals.difference(number, f"best/{name}") for name in ("recall@1", "opis", "score")
        )
        table.add_row(
            str(number),
            *(f"{outcome.recall:.4f}", change(recall, 2, scale=100)),
            *(f"{outcome.opis:.5f}", change(opis, 5)),
            *(f"{outcome.score:.4f}", change(score, 4)),
            ", ".join(["winner"] * (outcome is finals.winner) + ["baseline"] * (number == 0)),
        )
    rich.console.Console(width=max(rich.console.Console().width, 116)).print(table)


def finals_summary(finals: Finals) -> dict[str, float]:
    """The winner's differences from the baseline as flat MLflow metrics: finals/opis_change, .../low, .../high."""
    rows: dict[str, float] = {}
    for name in ("recall@1", "opis", "score"):
        found = finals.difference(finals.winner.number, f"best/{name}")
        if found is not None:
            rows[f"finals/{name}_change"] = found.mean
            if found.interval is not None:
                rows[f"finals/{name}_change/low"], rows[f"finals/{name}_change/high"] = found.interval
    return rows


def change(found: Difference | None, digits: int, *, scale: float = 1.0) -> str:
    """A mean difference with half of its 95 % interval: +0.45 +- 0.21; empty for None."""
    if found is None:
        return ""
    half = "" if found.interval is None else f" +- {scale * (found.interval[1] - found.mean):.{digits}f}"
    return f"{scale * found.mean:+.{digits}f}{half}"


def print_test(baseline: Tested | None, winner: Tested, *, toy: bool) -> None:
    """The winner beside the baseline on test classes, which no choice has seen."""
    table = rich.table.Table(
        title=f"{winner.classes} test classes, unseen until now",
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
    )
    table.add_column("")
    reference = winner if baseline is None else baseline
    for name in ("baseline", "winner", "change"):
        table.add_column(name, justify="right")
    for label, name, digits in (
        ("Recall@1", "recall@1", 4),
        ("OPIS", "opis", 5),
        ("sqrt(OPIS)", "sqrt_opis", 4),
        ("OPIS noise floor", "opis_noise_floor", 5),
        ("mean utility", "mean_utility", 4),
    ):
        before, after = reference.metrics[f"test/{name}"], winner.metrics[f"test/{name}"]
        change = f"{100 * (after - before):+.2f} points" if label == "Recall@1" else relative(before, after)
        if label == "OPIS noise floor":
            change = ""  # it says how far to trust the line above; less is not better
        shown = "failed" if baseline is None else f"{before:.{digits}f}"
        table.add_row(label, shown, f"{after:.{digits}f}", "" if baseline is None else change)
    rich.console.Console().print(table)
    if toy:
        print(TOY)


def study_summary(outcomes: Sequence[Outcome], baseline: Outcome | None, winner: Outcome) -> dict[str, float]:
    """How the trials ended and the val figures as flat MLflow metrics: trials/pruned, val/winner/opis, ...

    Args:
        outcomes: the trials of the search.
        baseline: the run that the winner is compared with, where there is one.
        winner: the run that is registered.
    """
    states = ("finished", "pruned", "failed", "unfinished")
    rows = {f"trials/{state}": float(sum(outcome.state == state for outcome in outcomes)) for state in states}
    for name, outcome in (("baseline", baseline), ("winner", winner)):
        if outcome is not None:
            figures = {"recall@1": outcome.recall, "opis": outcome.opis, "score": outcome.score}
            rows |= {f"val/{name}/{figure}": value for figure, value in figures.items()}
    return rows


def relative(before: float, after: float) -> str:
    """A change in percent of where it began: -12.3 %."""
    return f"{100 * (after / before - 1):+.1f} %" if before else "n/a"


def summary(baseline: Tested | None, winner: Tested) -> Mapping[str, float]:
    """The test figures as flat MLflow metrics: test/winner/opis, test/baseline/opis, ..."""
    rows = {f"test/winner/{name.removeprefix('test/')}": value for name, value in winner.metrics.items()}
    if baseline is not None:
        rows |= {f"test/baseline/{name.removeprefix('test/')}": value for name, value in baseline.metrics.items()}
        if baseline.metrics["test/opis"]:  # 0 where every class keeps to every threshold
            rows["test/opis_change"] = winner.metrics["test/opis"] / baseline.metrics["test/opis"] - 1
        rows["test/recall_difference"] = winner.metrics["test/recall@1"] - baseline.metrics["test/recall@1"]
    return rows

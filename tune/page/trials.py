"""Figures of how a search went: its history, and Recall@1 against OPIS."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tune.objective import Outcome, front, violation
from tune.page.figure import ACCENT, MUTED, Panel, blank, drawn, frame, scatter
from tune.page.findings import Findings

if TYPE_CHECKING:
    import plotly.graph_objects as go

LABELS = {"best/score": "score", "best/opis": "OPIS", "best/recall@1": "Recall@1"}


def history(findings: Findings) -> list[Panel]:
    """What the search looks for, trial by trial, with the best so far: a panel for each figure of its objective."""
    return [_history(findings, metric, direction) for metric, direction in findings.objective.metrics.items()]


def _history(findings: Findings, metric: str, direction: str) -> Panel:
    label = LABELS[metric]
    key, title = f"history-{label.lower().replace('@', '-')}", f"History of the search: {label}"
    found = [outcome for outcome in _by_number(findings) if outcome.state in ("finished", "pruned")]
    if not found:
        return Panel(key, title, "No trial finished.")
    best = _best_so_far(findings, metric, max if direction == "max" else min)
    figure, last = blank("trial", label), max(outcome.number for outcome in findings.outcomes)
    steps = [*best, *((last, value) for _, value in best[-1:])]
    _line(figure, [number for number, _ in steps], [value for _, value in steps], "best so far", shape="hv")
    values = [outcome.metrics[metric] for outcome in found]
    scatter(figure, findings, [(outcome, outcome.number, outcome.metrics[metric]) for outcome in found])
    figure.update_xaxes(range=[-0.7, last + 0.7])
    _whole_numbers(figure, len(findings.outcomes))
    limits = frame(values, [value for _, value in best])
    figure.update_yaxes(range=limits)
    bound = " among trials within the tolerance of the baseline's Recall@1"
    caption = (
        f"Each trial at its best epoch on val; the line is the best so far{bound}.{_outside(found, metric, limits)}"
    )
    without = [outcome.number for outcome in _by_number(findings) if outcome not in found]
    if without:
        caption += f" Failed, or did not end: trial{'s' if len(without) > 1 else ''} {_listed(without)}."
    alternative = f"{label} of {len(found)} trials on val."
    if best:
        alternative += f" The best so far begins at {best[0][1]:.5g} and ends at {best[-1][1]:.5g}."
    return Panel(key, title, caption, alternative, drawn(figure))


def _best_so_far(
    findings: Findings, metric: str, better: Callable[[Sequence[float]], float]
) -> list[tuple[int, float]]:
    """(trial, best value until it) for every finished trial that could win."""
    able = sorted(findings.judged, key=lambda outcome: outcome.number)
    found: list[tuple[int, float]] = []
    for outcome in able:
        value = outcome.metrics[metric]
        found.append((outcome.number, better([value, found[-1][1]]) if found else value))
    return found


def pareto(findings: Findings) -> Panel:
    """Recall@1 against sqrt(OPIS) of the finished trials, with their front."""
    key, title = "pareto", "Recall@1 against OPIS"
    finished = findings.finished
    if not finished:
        return Panel(key, title, "No trial finished.")
    figure = blank("sqrt(OPIS)", "Recall@1")
    best = front(finished)
    scatter(figure, findings, [(outcome, math.sqrt(outcome.opis), outcome.recall) for outcome in finished])
    marks = [outcome for outcome in (findings.baseline, findings.chosen) if outcome is not None]
    floor = math.sqrt(marks[-1].metrics.get("best/opis_noise_floor", math.nan)) if marks else math.nan
    kept = [*(outcome for outcome in best if not _collapsed(outcome)), *marks]
    x_limits = frame([math.sqrt(o.opis) for o in finished], [math.sqrt(o.opis) for o in kept])
    y_limits = frame([o.recall for o in finished], [o.recall for o in kept])
    if math.isfinite(floor):
        note = {"text": "noise floor", "font": {"color": MUTED, "size": 11}, "textangle": -90}
        place = {"y": 0, "yanchor": "bottom", "xanchor": "left"}
        figure.add_vline(floor, line={"color": MUTED, "dash": "dot", "width": 1}, annotation={**note, **place})
        x_limits = min(x_limits[0], floor - 0.04 * (x_limits[1] - floor)), x_limits[1]
    caption = (
        "The finished trials on val, each at its best epoch. sqrt(OPIS) is in units of utility, and less is more "
        "consistent: the upper left is where one wants to be. No trial beats one on the front in both figures."
    )
    reference = findings.baseline
    if reference is not None:
        least = reference.recall - findings.objective.tolerance
        figure.add_hline(least, line={"color": MUTED, "dash": "dash", "width": 1})
        y_limits = min(y_limits[0], least - 0.04 * (y_limits[1] - least)), y_limits[1]
        caption += " Below the dashed line no trial can win: the baseline's Recall@1 less the tolerance."
    if math.isfinite(floor):
        caption += " The dotted line is the winner's noise floor."
    # To the edges of the frame: what lies below and right of it is beaten.
    x, y = [math.sqrt(outcome.opis) for outcome in best], [outcome.recall for outcome in best]
    _line(figure, [x_limits[1], *x, x[-1]], [y[0], *y, y_limits[0]], "Pareto front", shape="vh")
    figure.update_xaxes(range=x_limits)
    figure.update_yaxes(range=y_limits)
    beyond = [
        o.number
        for o in finished
        if not (x_limits[0] <= math.sqrt(o.opis) <= x_limits[1] and y_limits[0] <= o.recall <= y_limits[1])
    ]
    if beyond:
        caption += f" Outside of the frame: trial{'s' if len(beyond) > 1 else ''} {_listed(beyond)}."
    alternative = f"{len(finished)} trials, {len(best)} on the front: " + "; ".join(
        f"trial {o.number} at Recall@1 {o.recall:.4f} and OPIS {o.opis:.5f}" for o in best[:8]
    )
    return Panel(key, title, caption, alternative + _could_win(findings), drawn(figure))


def _could_win(findings: Findings) -> str:
    reference, bound = findings.baseline, findings.objective.tolerance
    if reference is None:
        return ". The baseline did not finish."
    lost = sum(violation(o.recall, reference.recall, bound) > 0 for o in findings.finished)
    at = f"Recall@1 {reference.recall:.4f} and OPIS {reference.opis:.5f}"
    return f". The baseline lies at {at}; {lost} trials lie below the least Recall@1 that can win."


def _collapsed(outcome: Outcome) -> bool:
    """An encoder that tells nothing apart can lie on the front, far from all that is of interest."""
    return outcome.metrics.get("best/mean_utility", 1.0) == 0


def _by_number(findings: Findings) -> list[Outcome]:
    return sorted(findings.outcomes, key=lambda outcome: outcome.number)


def _line(figure: "go.Figure", x: Sequence[float], y: Sequence[float], name: str, *, shape: str) -> None:
    import plotly.graph_objects as go

    line = {"color": ACCENT, "width": 1.5, "shape": shape}
    figure.add_trace(go.Scatter(x=x, y=y, mode="lines", name=name, line=line, hoverinfo="skip"))


def _whole_numbers(figure: "go.Figure", trials: int) -> None:
    if trials <= 12:
        figure.update_xaxes(dtick=1)


def _outside(found: Sequence[Outcome], metric: str, limits: tuple[float, float]) -> str:
    beyond = [o.number for o in found if not limits[0] <= o.metrics[metric] <= limits[1]]
    return f" Outside of the frame: trial{'s' if len(beyond) > 1 else ''} {_listed(beyond)}." if beyond else ""


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(str(number) for number in numbers[:12])
    return f"{shown} and {len(numbers) - 12} more" if len(numbers) > 12 else shown

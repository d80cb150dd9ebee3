"""Figures of what the settings did: importance, a slice a setting, contours over the margins."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tune.objective import Outcome
from tune.page.figure import (
    ACCENT,
    INK,
    LONGEST,
    MUTED,
    PAPER,
    SCALE,
    SECOND,
    Panel,
    blank,
    drawn,
    frame,
    plain,
    scatter,
)
from tune.page.findings import Findings, value_of
from tune.page.importance import LEAST
from tune.ranges import Choice, Range
from tune.space import MARGIN_RATIO

MARGINS = ("tcm.margin_pos", "tcm.margin_neg")
FEWEST = 5
"""Points below which no surface is drawn through them."""


def importance(findings: Findings) -> Panel:
    """Each parameter's share in the variance of the figures."""
    import plotly.graph_objects as go

    key, title, shares = "importance", "Importance of the parameters", findings.importances
    if not shares:
        least = f"at least {LEAST} finished trials with TCM on"
        why = f"Not defined here: it takes {least}, and more than there are parameters."
        return Panel(key, title, why)
    first = next(iter(shares.values()))
    names = sorted(first, key=lambda name: -first[name])
    figure = blank("share of the variance", "")
    for (label, found), color in zip(shares.items(), (ACCENT, SECOND, MUTED), strict=False):
        figure.add_trace(
            go.Bar(
                x=[found[name] for name in names],
                y=[plain(name.removeprefix("tcm."), LONGEST) for name in names],
                orientation="h",
                name=label,
                marker={"color": color},
                hovertext=[f"{plain(name)}<br>{found[name]:.0%} of {label}" for name in names],
                hoverinfo="text",
            )
        )
    figure.update_layout(barmode="group", bargap=0.3)
    figure.update_xaxes(tickformat=".0%", rangemode="tozero")
    figure.update_yaxes(ticks="", type="category", autorange="reversed")
    trials = sum(outcome.settings.get("tcm.weight") != 0 for outcome in findings.finished)
    few = " With so few trials it is a hint, no more." if trials < 10 * len(names) else ""
    ratio = f" {MARGIN_RATIO} is margin_neg / margin_pos, which is what is sampled." if MARGIN_RATIO in names else ""
    caption = f"Functional ANOVA over {trials} finished trials with TCM on; bars of one figure sum to 1.{ratio}{few}"
    parts = (f"{label}: {', '.join(f'{name} {found[name]:.0%}' for name in names)}" for label, found in shares.items())
    return Panel(key, title, caption, ". ".join(parts), drawn(figure))


def slices(findings: Findings) -> list[Panel]:
    """What the search looks for against each setting that trials differ in."""
    metric, label = ("opis", "OPIS") if findings.objective.mode == "constrained" else ("score", "score")
    found = []
    for name in findings.names:
        outcomes = [
            outcome
            for outcome in findings.outcomes
            if f"best/{metric}" in outcome.metrics
            and outcome.state in ("finished", "pruned")
            and name in outcome.settings
            and not (name.startswith("tcm.") and value_of(outcome, name) is None)
        ]
        if len({str(value_of(outcome, name)) for outcome in outcomes}) > 1:
            found.append(_slice(findings, name, outcomes, metric, label))
    return found


def _slice(findings: Findings, name: str, outcomes: Sequence[Outcome], metric: str, label: str) -> Panel:
    values = [value_of(outcome, name) for outcome in outcomes]
    searched = findings.space.ranges.get(name)
    numbers = not isinstance(searched, Choice) and all(map(_is_number, values))
    places: list[Any] = values if numbers else [plain(value, LONGEST) for value in values]
    figure = blank("", label)
    figures = [outcome.metrics[f"best/{metric}"] for outcome in outcomes]
    scatter(figure, findings, list(zip(outcomes, places, figures, strict=True)), showlegend=False)
    reference, kept = findings.baseline, [o.metrics[f"best/{metric}"] for o in outcomes if o is findings.chosen]
    if reference is not None:
        height = reference.metrics[f"best/{metric}"]
        figure.add_hline(height, line={"color": MUTED, "dash": "dash", "width": 1})
        kept.append(height)
    figure.update_yaxes(range=frame(figures, kept))
    figure.update_xaxes(**_axis(searched, places, numbers=numbers))
    best = max(outcomes, key=lambda o: o.metrics[f"best/{metric}"] * (-1 if metric == "opis" else 1))
    at = value_of(best, name)
    alternative = (
        f"{label} of {len(outcomes)} trials against {name}; the best of them, {best.metrics[f'best/{metric}']:.5g}, "
        f"at {f'{at:.3g}' if isinstance(at, float) else at}."
    )
    return Panel(f"slice-{findings.names.index(name)}", name.removeprefix("tcm."), "", alternative, drawn(figure))


def _axis(searched: Range | Choice | None, places: Sequence[Any], *, numbers: bool) -> dict[str, Any]:
    """The x axis of a setting: all that was searched, on its own scale."""
    if isinstance(searched, Choice):
        order = [plain(value, LONGEST) for value in searched.values]
        return {"type": "category", "categoryorder": "array", "categoryarray": order, "range": [-0.5, len(order) - 0.5]}
    if not numbers:
        return {"type": "category", "categoryorder": "category ascending"}
    if searched is None:
        return {}
    # A recipe's own value may lie outside.
    low, high = min(searched.low, *places), max(searched.high, *places)
    if searched.kind == "log":
        decades = math.log10(high / low)
        ends = [math.log10(low) - 0.04 * decades, math.log10(high) + 0.04 * decades]
        return {"type": "log", "range": ends, "exponentformat": "e", **({"dtick": 1} if decades >= 1.5 else {})}
    return {"range": [low - 0.04 * (high - low), high + 0.04 * (high - low)]}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def contours(findings: Findings) -> list[Panel]:
    """Score and OPIS over both margins."""
    found = [outcome for outcome in findings.finished if all(_is_number(value_of(outcome, name)) for name in MARGINS)]
    if not found:
        return [Panel("contour", "The margins", "No trial with both margins finished.")]
    x, y = (np.array([float(str(value_of(outcome, name))) for outcome in found]) for name in MARGINS)
    if not _has_hull(x, y):
        figure = blank("margin_pos", "margin_neg")
        scatter(figure, findings, list(zip(found, x.tolist(), y.tolist(), strict=True)))
        why = "Their places alone: the trials are too few for contours, or all on one line."
        tried = "; ".join(f"trial {o.number} at {at:.3g} and {to:.3g}" for o, at, to in zip(found, x, y, strict=True))
        return [
            Panel("contour", "The margins that were tried", why, f"margin_pos and margin_neg: {tried}", drawn(figure))
        ]
    return [_contour(findings, found, x, y, metric, label) for metric, label in (("score", "Score"), ("opis", "OPIS"))]


def _contour(findings: Findings, outcomes: Sequence[Outcome], x: Any, y: Any, metric: str, label: str) -> Panel:
    import plotly.graph_objects as go

    key, title = f"contour-{metric}", f"{label} over the margins"
    z = np.array([outcome.metrics[f"best/{metric}"] for outcome in outcomes])
    low, high = frame([*z], [outcome.metrics[f"best/{metric}"] for outcome in outcomes if outcome is findings.chosen])
    low, high = max(low, z.min()), min(high, z.max())
    digits = ".5f" if metric == "opis" else ".3f" if high - low > 0.02 else ".4f"
    figure, (grid_x, grid_y, grid_z) = blank("margin_pos", "margin_neg"), _surface(x, y, z)
    scale = [[index / (len(SCALE) - 1), color] for index, color in enumerate(SCALE)]
    figure.add_trace(
        go.Contour(
            x=grid_x,
            y=grid_y,
            z=[[None if np.isnan(value) else value for value in row] for row in grid_z],
            colorscale=scale,
            reversescale=metric == "opis",  # a large OPIS is the bad end
            zmin=low,
            zmax=high,
            contours={"coloring": "heatmap", "start": low, "end": high, "size": (high - low) / 9 or 1},
            line={"width": 0.6, "color": PAPER},
            colorbar={"thickness": 10, "outlinewidth": 0, "tickfont": {"color": INK}, "tickformat": digits},
            hoverinfo="skip",
        )
    )
    caption = (
        "What stands out from the page is better. Straight between trials, with nothing beyond them; the trials' other "
        "settings differ too."
    )
    scatter(figure, findings, list(zip(outcomes, x.tolist(), y.tolist(), strict=True)), showlegend=False)
    best = outcomes[int(z.argmin() if metric == "opis" else z.argmax())]
    alternative = (
        f"{label} of {len(outcomes)} trials over margin_pos {x.min():.3g} to {x.max():.3g} and margin_neg "
        f"{y.min():.3g} to {y.max():.3g}; the best, {best.metrics[f'best/{metric}']:.5g}, is trial {best.number}."
    )
    return Panel(key, title, caption, alternative, drawn(figure))


def _has_hull(x: Any, y: Any) -> bool:
    """Whether the points are enough, and span an area."""
    at = np.unique(np.stack([x, y], axis=1).round(6), axis=0)
    spread = at - at.mean(axis=0)
    return len(at) >= FEWEST and bool(np.linalg.svd(spread, compute_uv=False)[-1] > 1e-3)


def _surface(x: Any, y: Any, z: Any, steps: int = 120) -> tuple[Any, Any, Any]:
    """Linear interpolation within the hull of the points, of the mean where several lie on one."""
    from scipy.interpolate import LinearNDInterpolator  # type: ignore[import-untyped]

    at, which = np.unique(np.stack([x, y], axis=1).round(6), axis=0, return_inverse=True)
    means = np.bincount(which.ravel(), z) / np.bincount(which.ravel())
    grid_x, grid_y = (np.linspace(values.min(), values.max(), steps) for values in (x, y))
    return grid_x, grid_y, LinearNDInterpolator(at, means, rescale=True)(*np.meshgrid(grid_x, grid_y))

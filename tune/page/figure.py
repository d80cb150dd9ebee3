"""What the figures of a search's page share: their colours by day and by night, clean axes, texts that stay texts."""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tune.objective import Outcome
from tune.page.findings import Findings, shown, value_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

INK, MUTED, GRID, PAPER = "#1f2933", "#66717d", "#dfe4ea", "#ffffff"
ACCENT, SECOND, WINNER = "#0b6e99", "#d9982b", "#c2343d"
BANDS = ("#d6e6ee", "#a9cbdc", "#75acc7")
"""Of a spread, from its whole to its middle."""
SCALE = ("#f2f7fa", "#9cc6da", "#3d8fb5", "#08496a")
"""Of a surface, from its least to its largest value."""
NIGHT = {
    INK: "#e6ebf0",
    MUTED: "#9aa7b3",
    GRID: "#303b46",
    PAPER: "#12181e",
    ACCENT: "#5cb8e0",
    SECOND: "#f2bd63",
    WINNER: "#ff8078",
    **dict(zip(BANDS, ("#173747", "#1f5068", "#2b7190"), strict=True)),
    **dict(zip(SCALE, ("#16222b", "#1d5068", "#3d93b8", "#c5e8f7"), strict=True)),
}
"""What the page's script puts in the place of each colour where the browser asks for dark pages."""
LONGEST = 28


@dataclass(frozen=True)
class Panel:
    """A figure with what is read beside it, and in its stead.

    Attributes:
        key: its id on the page.
        title: its heading.
        caption: how to read it.
        alternative: what it shows, for those who do not see it.
        figure: plotly's form of it; None where there is nothing to draw, and the caption says why.
    """

    key: str
    title: str
    caption: str
    alternative: str = ""
    figure: Mapping[str, Any] | None = None


def drawn(figure: "go.Figure") -> Mapping[str, Any]:
    """A figure as it goes into the page."""
    found: dict[str, Any] = json.loads(figure.to_json())
    return found


def blank(x: str, y: str) -> "go.Figure":
    """An empty figure with two named axes."""
    import plotly.graph_objects as go

    figure = go.Figure()
    line = {"gridcolor": GRID, "linecolor": GRID, "zeroline": False, "automargin": True, "title": {"standoff": 8}}
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12, "color": INK},
        margin={"l": 8, "r": 12, "t": 8, "b": 8},
        xaxis={**line, "title": {"text": x, "standoff": 8}},
        yaxis={**line, "title": {"text": y, "standoff": 8}},
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        hoverlabel={"bgcolor": PAPER, "bordercolor": MUTED, "font": {"color": INK}, "align": "left"},
        hovermode="closest",
    )
    return figure


def plain(text: object, longest: int = 0) -> str:
    """A text as plotly draws it: its tags and entities stay what was written, and a long one loses its middle."""
    words = " ".join(str(text).split())
    if longest and len(words) > longest:
        end = (longest - 1) // 3
        words = f"{words[: longest - 1 - end]}…{words[-end:]}"
    return html.escape(words, quote=False)


def hover(outcome: Outcome, names: Sequence[str]) -> str:
    """What a trial's point says when it is pointed at."""
    metrics = outcome.metrics
    figures = (
        f"{label} {metrics[f'best/{name}']:.{digits}f}"
        for label, name, digits in (("Recall@1", "recall@1", 4), ("OPIS", "opis", 5), ("score", "score", 4))
        if f"best/{name}" in metrics
    )
    settings = (
        f"{name.removeprefix('tcm.')} {shown(value_of(outcome, name))}"
        for name in names
        if value_of(outcome, name) is not None
    )
    state = (
        "" if outcome.state == "finished" else f", {'stopped early' if outcome.state == 'pruned' else outcome.state}"
    )
    return "<br>".join(plain(line, 60) for line in (f"trial {outcome.number}{state}", *figures, *settings))


def kinds(findings: Findings, outcomes: Sequence[Outcome]) -> list[tuple[str, dict[str, Any], list[Outcome]]]:
    """The trials by how they are marked: name in the legend, plotly's marker, trials. Later ones lie above."""
    edge, size = {"color": PAPER, "width": 1}, 8 if len(outcomes) <= 200 else 5
    won = "winner: the baseline" if findings.chosen is not None and findings.chosen.number == 0 else "winner"
    marks: dict[str, dict[str, Any]] = {
        "stopped early": {"symbol": "circle-open", "size": size - 1, "color": MUTED},
        "trial": {"symbol": "circle", "size": size, "color": ACCENT, "line": edge},
        "baseline, no TCM": {"symbol": "square", "size": 11, "color": INK, "line": edge},
        won: {"symbol": "star", "size": 16, "color": WINNER, "line": edge},
    }

    def kind(outcome: Outcome) -> str:
        if outcome is findings.chosen:
            return won
        if outcome.number == 0:
            return "baseline, no TCM"
        return "trial" if outcome.state == "finished" else "stopped early"

    return [
        (name, marker, found)
        for name, marker in marks.items()
        if (found := [outcome for outcome in outcomes if kind(outcome) == name])
    ]


def scatter(
    figure: "go.Figure",
    findings: Findings,
    points: Sequence[tuple[Outcome, Any, Any]],
    **place: Any,
) -> None:
    """Adds trials as points at (x, y), each marked as `kinds` has it; `place` goes to plotly's trace."""
    import plotly.graph_objects as go

    at = {outcome.number: (x, y) for outcome, x, y in points}
    for name, marker, outcomes in kinds(findings, [outcome for outcome, _, _ in points]):
        figure.add_trace(
            go.Scatter(
                x=[at[outcome.number][0] for outcome in outcomes],
                y=[at[outcome.number][1] for outcome in outcomes],
                mode="markers",
                name=name,
                marker=marker,
                hovertext=[hover(outcome, findings.names) for outcome in outcomes],
                hoverinfo="text",
                cliponaxis=False,
                **place,
            )
        )


def frame(values: Sequence[float], kept: Sequence[float]) -> tuple[float, float]:
    """The limits of an axis that leave far outliers out: Tukey's far fences, with `kept` inside whatever they are."""
    import numpy as np

    low, high = np.quantile(values, (0.25, 0.75))
    reach = 3 * (high - low)
    inside = [*kept, *(value for value in values if low - reach <= value <= high + reach)]
    least, largest = min(inside), max(inside)
    air = 0.08 * (largest - least) or 0.05 * abs(largest) or 0.01
    return float(least - air), float(largest + air)

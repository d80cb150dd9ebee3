"""Figures of utility against threshold on test classes, baseline and winner side by side."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dml.metrics.inputs import Floats
from dml.metrics.threshold import ThresholdCurves, mean_utility, noise_floor, opis, utility
from dml.plots.utility import LINES
from tune.page.figure import ACCENT, BANDS, INK, Panel, blank, drawn
from tune.page.findings import Findings

if TYPE_CHECKING:
    import plotly.graph_objects as go

SPREADS = ((0.01, 0.99), (0.10, 0.90), (0.25, 0.75))


def curves(findings: Findings) -> list[Panel]:
    """Utility of the test classes over the calibration range: the baseline's, then the winner's, on the same axes."""
    models = [("baseline", findings.tested_baseline), ("winner", findings.tested)]
    if findings.tested is findings.tested_baseline:
        models = models[1:]
    found = [(name, model.curves) for name, model in models if model is not None and model.curves is not None]
    if not found:
        return []
    c = findings.config.evaluate.utility_c
    several = [lines for _, lines in found]
    x_limits = [min(float(o.thresholds_T[0]) for o in several), max(float(o.thresholds_T[-1]) for o in several)]
    # Low enough for nearly every class: one lost class would press the others flat against the top.
    low = min(float(np.quantile(utility(lines, c), 0.005)) for lines in several)
    y_limits = [max(-0.02, low - 0.25 * (1 - low) - 0.02), 1.005]
    return [_panel(name, lines, c, x_limits, y_limits) for name, lines in found]


def _panel(name: str, lines: ThresholdCurves, c: float, x_limits: Sequence[float], y_limits: Sequence[float]) -> Panel:
    import plotly.graph_objects as go

    utility_CT, thresholds_T = utility(lines, c), lines.thresholds_T
    figure = blank(f"{lines.distance} distance threshold", "utility" if c == 1 else f"utility (c = {c:g})")
    if len(utility_CT) <= LINES:
        _lines(figure, thresholds_T, utility_CT)
    else:
        for (low, high), color in zip(SPREADS, BANDS, strict=True):
            below_T, above_T = np.quantile(utility_CT, (low, high), axis=0)
            figure.add_trace(
                go.Scatter(
                    x=[*thresholds_T, *thresholds_T[::-1]],
                    y=[*above_T, *below_T[::-1]],
                    fill="toself",
                    fillcolor=color,
                    line={"width": 0},
                    mode="lines",
                    name=f"{high - low:.0%} of classes",
                    hoverinfo="skip",
                )
            )
    mean_T = utility_CT.mean(axis=0)
    text = [f"threshold {at:.3f}<br>mean utility {value:.4f}" for at, value in zip(thresholds_T, mean_T, strict=True)]
    figure.add_trace(
        go.Scatter(
            x=[*thresholds_T],
            y=[*mean_T],
            mode="lines",
            name="mean over classes",
            line={"color": INK, "width": 2.5},
            hovertext=text,
            hoverinfo="text",
        )
    )
    figure.update_xaxes(range=x_limits)
    figure.update_yaxes(range=y_limits)
    score, floor = opis(lines, c), noise_floor(lines, c)
    said = (
        f"OPIS {score:.5f} (sqrt {score**0.5:.4f}), noise floor {floor:.5f}, mean utility {mean_utility(lines, c):.4f}"
    )
    spread_T = utility_CT.std(axis=0)
    alternative = (
        f"Utility of {len(utility_CT)} classes at {lines.distance} distance thresholds {thresholds_T[0]:.3f} to "
        f"{thresholds_T[-1]:.3f}: mean {mean_T[0]:.3f} to {mean_T[-1]:.3f}, standard deviation over classes "
        f"{spread_T[0]:.3f} to {spread_T[-1]:.3f}. {said}."
    )
    return Panel(f"utility-{name}", f"Utility of the {name}", f"{said}.", alternative, drawn(figure))


def _lines(figure: "go.Figure", thresholds_T: Floats, utility_CT: Floats) -> None:
    """All classes as one trace, with a gap after each."""
    import plotly.graph_objects as go

    figure.add_trace(
        go.Scatter(
            x=[value for _ in utility_CT for value in (*thresholds_T, None)],
            y=[value for row in utility_CT for value in (*row, None)],
            mode="lines",
            name=f"one class ({len(utility_CT)} in all)",
            line={"color": ACCENT, "width": 1},
            opacity=0.55,
            hoverinfo="skip",
        )
    )

"""A search's findings as one HTML file that loads nothing: figures drawn by plotly.js, which it holds once."""

import base64
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from tune.page import settings, tables, trials, utility, verdict
from tune.page.figure import NIGHT, Panel
from tune.page.findings import Findings
from tune.page.tables import Table

PACKAGES = ("onethreshold", "torch", "ray", "optuna", "timm", "numpy")
"""Whose versions are given, beside Python's."""


@dataclass(frozen=True)
class Section:
    """Figures under one heading.

    Attributes:
        key: its id on the page.
        heading: of the section.
        text: beneath the heading.
        panels: its figures.
    """

    key: str
    heading: str
    text: str
    panels: Sequence[Panel]


def render(findings: Findings) -> str:
    """The page as text of UTF-8 HTML.

    Every text in it is escaped. Its content security policy names the two scripts by their hashes and allows nothing to
    be loaded, so that nothing which came in through a name could run or leave.
    """
    from plotly.offline import get_plotlyjs

    sections = _sections(findings)
    panels = [panel for section in sections for panel in section.panels if panel.figure is not None]
    figures = {"night": NIGHT, "figures": {panel.key: panel.figure for panel in panels}}
    # A parser of HTML reads every line end as \n, and so must the hash.
    scripts = [text.replace("\r\n", "\n") for text in (get_plotlyjs(), _own("page.js"))] if panels else []
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.lstrip_blocks = True
    own, recipe = _settings(findings)
    return environment.from_string(_own("page.html")).render(
        findings=findings,
        policy=_policy(scripts),
        style=Markup(_own("page.css")),  # noqa: S704  # the package's own
        scripts=[Markup(text) for text in scripts],  # noqa: S704  # plotly's and the package's own
        figures=_json(figures),
        paragraphs=verdict.paragraphs(findings),
        doubts=verdict.doubts(findings),
        comparisons=[*tables.comparisons(findings), *_present(tables.finals(findings))],
        sections=sections,
        trials=tables.trials(findings),
        own=own,
        recipe=recipe,
        versions=_versions(),
    )


def _sections(findings: Findings) -> list[Section]:
    metric = "OPIS" if findings.objective.mode == "constrained" else "the score"
    slices = (
        f"{metric[0].upper()}{metric[1:]} on val against each setting, whatever the others were. The dashed line is "
        "the baseline's; hollow points were stopped early."
    )
    seeds = (
        "These are the search's own trials, all of one seed; the winner was chosen by its mean over new seeds."
        if findings.finals is not None
        else ""
    )
    found = [
        Section("found", "What was found on val", seeds, [trials.pareto(findings), *trials.history(findings)]),
        Section(
            "utility",
            "Utility on test, class by class",
            "One threshold for all: where the classes' curves lie together it treats them alike. OPIS is the variance "
            "between them, averaged over the thresholds.",
            utility.curves(findings),
        ),
        Section("margins", "The margins", "", [*settings.contours(findings), settings.importance(findings)]),
        Section("slices", "Setting by setting", slices, settings.slices(findings)),
    ]
    return [section for section in found if section.panels]


def _settings(findings: Findings) -> tuple[Table, Table]:
    own = {
        **{name.replace("_", "-"): value for name, value in findings.options.items()},
        **{f"objective.{name}": value for name, value in findings.objective.model_dump().items()},
        **{f"searched: {name}": values for name, values in findings.space.ranges.items()},
        **findings.facts,
    }
    return (
        _pairs("search-settings", "Settings of the search", own),
        _pairs("recipe", "Settings of the recipe, which trials start from", findings.config.flat),
    )


def _pairs(key: str, caption: str, rows: Mapping[str, object]) -> Table:
    cells = tuple((name, "" if value is None else str(value)) for name, value in rows.items())
    return Table(key, caption, ("Setting", "Value"), cells, words=frozenset({1}))


def _present(table: Table | None) -> list[Table]:
    return [] if table is None else [table]


def _versions() -> str:
    named = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return f"Python {platform.python_version()}, {named}, on {platform.system()} {platform.machine()}"


def _own(name: str) -> str:
    return resources.files("tune.page").joinpath(name).read_text(encoding="utf-8")


def _json(content: Mapping[str, Any]) -> Markup:
    """JSON that no parser of HTML takes for the end of its script element."""
    text = json.dumps(content, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))  # noqa: S704


def _policy(scripts: Sequence[str]) -> str:
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{value}'" for value in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )

"""The page as a browser has it: its parts, that nothing in it runs or loads but what should, and how it looks."""

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.tune.page.browser import BINARY, Tab, browser
from tests.tune.page.fabricated import findings
from tune.page import Findings, render

HOSTILE = '</script><img src=x onerror="hacked=1"><b>{{ 7*7 }}</b>'

CASES: dict[str, dict[str, Any]] = {
    "seeds": {"trials": 16, "states": {5: "failed", 9: "pruned"}, "seeds": 3, "words": ["encoder.dim=[128,512]"]},
    "pareto": {"mode": "pareto", "trials": 10, "states": {3: "unfinished"}, "classes": 70},
    "constrained": {"mode": "constrained", "trials": 8, "by": "gp", "tested": False},
    "one": {"trials": 1},
    "without-baseline": {"trials": 6, "states": {0: "failed"}},
    "hopeless": {"trials": 2, "states": {0: "failed", 1: "failed"}},
}


class Parts(HTMLParser):
    """The elements of a page in their order, with their attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Findings]:
    folder = tmp_path_factory.mktemp("studies")
    return {name: findings(folder, name=name, **case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def hostile(pages: dict[str, Findings]) -> str:
    """A page on which every text that comes from outside would like to be HTML."""
    found = pages["seeds"]
    outcomes = [
        replace(o, error=HOSTILE if o.error else "", settings={**o.settings, "encoder.name": f"{HOSTILE}{o.number}"})
        for o in found.outcomes
    ]
    chosen = next(outcome for outcome in outcomes if found.chosen and outcome.number == found.chosen.number)
    config = found.config.replace(**{"data.dataset": HOSTILE})
    texts = {"name": HOSTILE, "command": HOSTILE, "facts": {HOSTILE: HOSTILE}, "options": {"sampler": HOSTILE}}
    importances = {"score": {HOSTILE: 1.0}}
    return render(
        replace(found, outcomes=outcomes, chosen=chosen, config=config, importances=importances, **texts)  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("case", CASES)
def test_a_page_has_headings_captions_and_alternatives(pages: dict[str, Findings], case: str) -> None:
    parts = Parts(render(pages[case]))
    levels = [int(tag[1]) for tag, _ in parts.found if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels)), "no level is skipped"
    assert parts.of("html") == [{"lang": "en"}]
    assert len(parts.of("caption")) == len(parts.of("table")) >= 3
    assert all(header.get("scope") in ("col", "row") for header in parts.of("th"))
    plots = [attributes for attributes in parts.of("div") if attributes.get("class") == "plot"]
    assert bool(plots) == (case != "hopeless")
    assert all(plot["role"] == "img" and plot["aria-label"] for plot in plots)
    ids = [attributes["id"] for _, attributes in parts.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [str(attributes["href"])[1:] for attributes in parts.of("a")]
    assert set(links) <= set(ids)
    scrolled = [attributes for attributes in parts.of("div") if attributes.get("class") == "scroll"]
    assert all(attributes["tabindex"] == "0" and attributes["aria-labelledby"] in ids for attributes in scrolled)


def test_the_policy_names_the_scripts_and_nothing_else(pages: dict[str, Findings]) -> None:
    text = render(pages["seeds"])
    parts = Parts(text)
    (policy,) = [str(meta["content"]) for meta in parts.of("meta") if meta.get("http-equiv")]
    runs = [
        text for text, attributes in zip(parts.scripts, parts.of("script"), strict=True) if "type" not in attributes
    ]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in runs]
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    assert policy.startswith(f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; ")
    assert [script.count("* plotly.js v") for script in runs] == [1, 0]
    assert not [attributes for _, attributes in parts.found if "src" in attributes]
    assert not [name for _, attributes in parts.found for name in attributes if name.startswith("on")]


def test_every_text_is_escaped(hostile: str) -> None:
    parts = Parts(hostile)
    assert parts.of("img") == parts.of("b") == []
    assert hostile.count("{{ 7*7 }}") > 10
    assert hostile.count("&lt;/script&gt;&lt;img src=x") > 10
    assert json.loads(parts.scripts[0])["figures"]["importance"]["data"][0]["y"][0].startswith("&lt;/script&gt;")


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if BINARY is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_browser_draws_it_alone_at_any_width(tab: Tab, pages: dict[str, Findings], tmp_path: Path, case: str) -> None:
    path = tmp_path / f"{case}.html"
    path.write_text(render(pages[case]), encoding="utf-8")
    for width, dark in ((1400, False), (390, True)):
        tab.open(path, width=width, dark=dark)
        assert tab.said() == []
        assert tab.asked() == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        drawn = tab.evaluate("[...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('svg').length > 0)")
        assert all(drawn)
        assert bool(drawn) == (case != "hopeless")
        wide = "[...document.querySelectorAll('.plot')].filter(p => p.scrollWidth > p.clientWidth + 1).map(p => p.id)"
        assert tab.evaluate(wide) == []


@pytest.mark.slow
def test_figures_follow_the_browser_from_day_to_night(tab: Tab, pages: dict[str, Findings], tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(render(pages["seeds"]), encoding="utf-8")
    ink = "getComputedStyle(document.querySelector('#pareto .xtick text')).fill"
    page = "getComputedStyle(document.body).backgroundColor"
    tab.open(path, width=1000)
    assert (tab.evaluate(ink), tab.evaluate(page)) == ("rgb(31, 41, 51)", "rgb(255, 255, 255)")
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    tab.until(f"[{ink}, {page}]", ["rgb(230, 235, 240)", "rgb(18, 24, 30)"])


@pytest.mark.slow
def test_a_browser_runs_nothing_that_came_in_through_a_text(tab: Tab, hostile: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.html"
    path.write_text(hostile, encoding="utf-8")
    tab.open(path, width=1000)
    assert tab.said() == []
    assert tab.asked() == []
    assert tab.evaluate("typeof hacked") == "undefined"
    assert tab.evaluate("document.querySelectorAll('img, b').length") == 0
    assert HOSTILE in tab.evaluate("document.querySelector('h1').textContent")

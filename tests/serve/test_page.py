"""The page at /: what it is made of, and in a browser what a person does with it, by mouse, keyboard and ear."""

import re
import shutil
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request, Response
from fastapi.testclient import TestClient
from playwright.sync_api import Browser, Page, expect, sync_playwright

from serve import api, page, schemas
from serve.calibration import Calibration
from serve.client import Client
from serve.gallery.galleries import Galleries
from serve.gallery.limits import GalleryLimits
from serve.schemas import ApiError
from tests.serve.calibrated import calibration, colour
from tests.serve.pictures import Held, png
from tests.serve.server import running

BINARY = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CALIBRATION = calibration()
KEY = "the-key"
SHADES = {"red": (255, 0, 0), "pink": (255, 64, 0), "violet": (150, 0, 255), "blue": (0, 0, 255)}
HOSTILE = '"><img src=x onerror="window.hacked=1">'


class Parts(HTMLParser):
    """The elements of a page in their order, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_it_is_made_of_its_own_files_under_a_strict_policy() -> None:
    with TestClient(api.build(Held(None))) as client:
        answer = client.get("/")
        parts = Parts(answer.text)
        loaded = [*(each["src"] for tag in ("img", "script") for each in parts.of(tag) if each.get("src"))]
        loaded += [each["href"] for each in parts.of("link")]
        assert {f"/{path}" for path in loaded} == {"/page/style.css", "/page/page.js", "/page/icon.svg"}
        for name, media in page.TYPES.items():
            found = client.get("/" if name == "index.html" else f"/page/{name}")
            assert (found.status_code, found.headers["content-type"]) == (200, media)
            assert found.headers["content-security-policy"].startswith("default-src 'self'; img-src 'self' blob:; ")
            assert "unsafe" not in found.headers["content-security-policy"]
            assert found.headers["x-content-type-options"] == "nosniff"
            assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", found.text)
        for absent in ("/page/", "/page/index.html", "/page/../api.py", "/page/%2e%2e/api.py"):
            assert client.get(absent).status_code == 404
    assert not [
        name for _, attributes in parts.found for name in attributes if name.startswith("on") or name == "style"
    ]


def test_all_its_files_are_packaged() -> None:
    project = tomllib.loads(Path(page.__file__).parents[2].joinpath("pyproject.toml").read_text())
    assert set(project["tool"]["setuptools"]["package-data"]["serve.page"]) == set(page.TYPES)
    assert {path.name for path in Path(page.__file__).parent.iterdir() if path.is_file()} == {
        *page.TYPES,
        "__init__.py",
    }


def test_every_control_has_a_name_and_no_heading_level_is_skipped() -> None:
    with TestClient(api.build(Held(None))) as client:
        parts = Parts(client.get("/").text)
    levels = [int(tag[1]) for tag, _ in parts.found if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1
    assert set(levels) == {1, 2}
    ids = [attributes["id"] for _, attributes in parts.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = {attributes["for"] for attributes in parts.of("label")}
    for control in (*parts.of("input"), *parts.of("select")):
        assert control["id"] in labelled or control.get("aria-labelledby") in ids
    named = [
        value for _, a in parts.found for name, value in a.items() if name in ("aria-labelledby", "aria-describedby")
    ]
    assert set(named) <= set(ids)
    assert parts.of("html") == [{"lang": "en"}]


class Service:
    """The app around a model in the test's hands, with a gallery, and a key when one is set."""

    def __init__(self, folder: Path, used: Calibration | None = CALIBRATION) -> None:
        self.source = Held(colour(used))
        self.key = ""
        self.app = api.build(self.source, galleries=Galleries(folder, GalleryLimits()))
        self.app.middleware("http")(self._guard)
        self.url = ""

    async def _guard(self, request: Request, go_on: Any) -> Response:
        wanted = request.url.path.startswith("/v1") and self.key
        if wanted and request.headers.get("authorization") != f"Bearer {self.key}":
            return schemas.error_response(ApiError(401, "this API key is not known", code="unknown_key"))
        answer: Response = await go_on(request)
        return answer

    def fill(self) -> None:
        """A gallery that keeps its images."""
        with Client(self.url) as client:
            client.create_gallery("shades", keep_images=True)
            shades = [(name, png(rgb), {"shelf": 3}) for name, rgb in SHADES.items()]
            client.add("shades", [*shades, (HOSTILE, [0.0, 1.0, 0.0])])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if BINARY is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BINARY, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path / "galleries")
    with running(service.app) as service.url:
        service.fill()
        yield service


@pytest.fixture
def tab(browser: Browser, service: Service) -> Iterator[Page]:
    """The page, open; at the end nothing that the policy forbids was tried, and nothing failed."""
    tab = browser.new_page(viewport={"width": 1200, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    yield tab
    # A refusal that the page is told of is shown by the browser as well.
    assert [line for line in said if "Failed to load resource" not in line] == []
    assert [url for url in asked if not url.startswith((service.url, f"blob:{service.url}"))] == []
    tab.close()


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Path]:
    for name, rgb in SHADES.items():
        (tmp_path / f"{name}.png").write_bytes(png(rgb, size=(120, 90)))
    return {name: tmp_path / f"{name}.png" for name in SHADES}


def opened(tab: Page, service: Service) -> Page:
    tab.goto(service.url)
    expect(tab.get_by_text("colour@7 · 3 dimensions · 8 px")).to_be_visible()
    return tab


def give(tab: Page, first: Path, second: Path | None = None) -> None:
    tab.locator("#file-a").set_input_files(first)
    if second is not None:
        tab.locator("#file-b").set_input_files(second)


@pytest.mark.slow
def test_two_images_are_the_same_or_not_as_the_slider_moves(
    tab: Page, service: Service, pictures: dict[str, Path]
) -> None:
    opened(tab, service)
    expect(tab.locator("#word")).to_have_text("No pair yet")
    give(tab, pictures["red"], pictures["pink"])
    expect(tab.locator("#word")).to_have_text("Same")
    expect(tab.get_by_role("img", name=re.compile("This pair is at 0.2"))).to_be_visible()
    expect(tab.locator("#spoken")).to_contain_text("Same, 0.2")

    slider = tab.get_by_role("slider", name="False accept rate")
    for point in CALIBRATION.points:
        tab.get_by_role("button", name=f"{point.far_target:.1%}".replace(".0%", "%"), exact=True).click()
        shown = f"{point.far_target:.1%}".replace(".0%", "%")
        expect(slider).to_have_attribute("aria-valuetext", f"{shown}, threshold {point.threshold:.3f}")
        expect(tab.get_by_role("button", name=shown, exact=True)).to_have_attribute("aria-pressed", "true")
        expect(tab.locator("#rates")).to_contain_text("95%:")
    slider.fill("0.1")
    expect(tab.locator("#word")).to_have_text("Not the same")
    expect(tab.locator("#rates")).to_contain_text("not a calibrated point, so without intervals")
    assert tab.locator("#points [aria-pressed=true]").count() == 0
    give(tab, pictures["red"], pictures["red"])
    expect(tab.locator("#word")).to_have_text("Same")
    expect(tab.locator("#why")).to_contain_text("0.000 apart")
    tab.get_by_role("button", name="Remove the second image").click()
    expect(tab.locator("#word")).to_have_text("No pair yet")


@pytest.mark.slow
def test_rates_between_the_points_are_counted_on_the_calibration_pairs(tab: Page, service: Service) -> None:
    opened(tab, service)
    slider = tab.get_by_role("slider")
    slider.fill("1.2")
    pairs = CALIBRATION.histograms
    assert pairs is not None
    far = sum(pairs.negatives[:60]) / sum(pairs.negatives)
    frr = 1 - sum(pairs.positives[:60]) / sum(pairs.positives)
    text = tab.locator("#rates").inner_text()
    assert text.startswith(
        f"{float(f'{100 * far:.2g}'):g}% of different pairs accepted, {float(f'{100 * frr:.2g}'):g}%"
    )
    slider.press("Home")
    expect(tab.locator("#rates")).to_contain_text("none of 60,000")


@pytest.mark.slow
def test_the_keyboard_reaches_everything_in_order_and_moves_the_slider(
    tab: Page, service: Service, pictures: dict[str, Path]
) -> None:
    opened(tab, service)
    give(tab, pictures["red"], pictures["pink"])
    expect(tab.locator("#word")).to_have_text("Same")
    focused = []
    for _ in range(14):
        tab.keyboard.press("Tab")
        focused.append(tab.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    expected = ["Skip to the comparison", "file-a", "remove-a", "file-b", "remove-b", "slider", "10%", "1%", "0.1%"]
    assert focused[: len(expected)] == expected
    assert focused[len(expected) :][:2] == ["Operating points", "gallery"]

    slider = tab.get_by_role("slider")
    slider.focus()
    seen = [slider.get_attribute("aria-valuetext")]
    for key in ("PageDown", "PageUp", "PageUp", "ArrowRight", "ArrowLeft", "End", "Home"):
        tab.keyboard.press(key)
        seen.append(slider.get_attribute("aria-valuetext"))
    rates = [str(text).partition(",")[0] for text in seen]
    assert rates[:4] == ["1%", "0.1%", "1%", "10%"]
    assert rates[5:7] == ["10%", "100%"]
    assert rates[7] == "none of 60"
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


@pytest.mark.slow
def test_the_documents_of_the_api_are_the_services_own_too(tab: Page, service: Service) -> None:
    tab.goto(f"{service.url}/docs")
    tab.locator("[data-path='/v1/verify']").click()
    expect(tab.get_by_role("button", name="Try it out")).to_be_visible()


def test_images_come_by_drop_and_by_paste_too(tab: Page, service: Service) -> None:
    opened(tab, service)
    send = """([kind, target, colours]) => Promise.all(colours.map((colour) => {
        const canvas = Object.assign(document.createElement("canvas"), { width: 8, height: 8 });
        const context = canvas.getContext("2d");
        context.fillStyle = colour;
        context.fillRect(0, 0, 8, 8);
        const file = (blob) => new File([blob], colour + ".png", { type: "image/png" });
        return new Promise((done) => canvas.toBlob((blob) => done(file(blob))));
    })).then((files) => {
        const data = new DataTransfer();
        for (const file of files) data.items.add(file);
        const options = { bubbles: true, cancelable: true };
        const event = kind === "drop"
            ? new DragEvent("drop", { ...options, dataTransfer: data })
            : new ClipboardEvent("paste", { ...options, clipboardData: data });
        document.querySelector(target).dispatchEvent(event);
    })"""
    tab.evaluate(send, ["drop", "body", ["red", "red"]])
    expect(tab.locator("#word")).to_have_text("Same")
    tab.evaluate(send, ["drop", "#slot-a label", ["blue"]])
    expect(tab.locator("#word")).to_have_text("Not the same")
    expect(tab.locator("#name-a")).to_have_text("blue.png")
    tab.evaluate(send, ["paste", "body", ["blue"]])
    expect(tab.locator("#word")).to_have_text("Same")
    expect(tab.locator("#name-b")).to_have_text("blue.png")


@pytest.mark.slow
def test_one_image_finds_its_nearest_in_a_gallery(tab: Page, service: Service, pictures: dict[str, Path]) -> None:
    opened(tab, service)
    give(tab, pictures["red"])
    hits = tab.locator("#hits li")
    expect(hits).to_have_count(5)
    expect(hits.first).to_contain_text("red")
    expect(hits.first).to_contain_text("shelf: 3")
    expect(hits.first.locator(".mark")).to_have_text("same")
    expect(hits.nth(2).locator(".mark")).to_have_text("not the same")
    expect(hits.first.locator("img")).to_have_js_property("complete", True)
    assert hits.first.locator("img").evaluate("image => image.naturalWidth") > 0
    tab.get_by_role("slider").press("Home")
    expect(hits.nth(1).locator(".mark")).to_have_text("not the same")
    assert tab.get_by_text(HOSTILE).count() == 1
    assert tab.evaluate("window.hacked") is None


@pytest.mark.slow
def test_what_is_no_image_is_said_to_everyone(tab: Page, service: Service, pictures: dict[str, Path]) -> None:
    opened(tab, service)
    text = pictures["red"].with_name("words.txt")
    text.write_text("words")
    give(tab, text)
    expect(tab.get_by_role("alert")).to_have_text("words.txt is no image")
    broken = pictures["red"].with_name("broken.png")
    broken.write_bytes(png()[:40])
    give(tab, pictures["red"], broken)
    expect(tab.get_by_role("alert")).to_contain_text("The second image is unreadable")
    expect(tab.locator("#word")).to_have_text("No answer")
    give(tab, pictures["red"], pictures["red"])
    expect(tab.locator("#word")).to_have_text("Same")
    expect(tab.get_by_role("alert")).to_be_hidden()


@pytest.mark.slow
def test_a_key_is_asked_for_when_the_service_wants_one(tab: Page, service: Service, pictures: dict[str, Path]) -> None:
    service.key = KEY
    opened(tab, service)
    key = tab.get_by_label("API key")
    expect(key).to_be_focused()
    key.fill("wrong")
    key.press("Enter")
    expect(tab.get_by_role("alert")).to_have_text("this API key is not known")
    key.fill(KEY)
    tab.get_by_role("button", name="Use it").click()
    expect(key).to_be_hidden()
    expect(tab.get_by_role("alert")).to_be_hidden()
    give(tab, pictures["red"], pictures["red"])
    expect(tab.locator("#word")).to_have_text("Same")
    expect(tab.locator("#hits img")).to_have_count(4)
    tab.reload()
    expect(tab.get_by_role("button", name="0.1%")).to_be_visible()
    assert tab.evaluate("[localStorage.length, document.cookie]") == [0, ""]


@pytest.mark.slow
def test_without_a_champion_it_waits_and_without_points_a_threshold_decides(
    tab: Page, service: Service, pictures: dict[str, Path]
) -> None:
    service.source.current = None
    tab.goto(service.url)
    expect(tab.get_by_text("No model is served yet; looking again")).to_be_visible()
    service.source.current = colour(None)
    expect(tab.get_by_text("colour@7 · 3 dimensions")).to_be_visible(timeout=15_000)
    expect(tab.locator("#rates")).to_contain_text("no operating points")
    give(tab, pictures["red"], pictures["blue"])
    expect(tab.locator("#word")).to_have_text("Not the same")
    tab.get_by_role("slider").fill("1.5")
    expect(tab.locator("#word")).to_have_text("Same")
    expect(tab.locator("#calibration")).to_be_hidden()
    assert tab.locator("#points button").count() == 0


@pytest.mark.slow
def test_a_calibration_that_changes_meanwhile_is_taken_up(
    tab: Page, service: Service, pictures: dict[str, Path]
) -> None:
    opened(tab, service)
    other = Calibration.of(
        [vars(CALIBRATION.at(0.1)) | {"threshold": 1.5}], None, "ours.csv: 3 positives", 1_800_000_000
    )
    service.source.current = colour(other)
    give(tab, pictures["red"], pictures["blue"])
    expect(tab.locator("#word")).to_have_text("Same")
    expect(tab.locator("#points button")).to_have_text(["10%"])
    tab.get_by_text("Operating points", exact=True).click()
    expect(tab.locator("caption")).to_contain_text(f"Calibration {other.id}, made from ours.csv")
    expect(tab.get_by_role("cell", name="1.5000")).to_be_visible()


@pytest.mark.slow
def test_a_pair_that_is_compared_while_the_last_ones_calibration_is_read_is_the_one_shown(
    tab: Page, service: Service, pictures: dict[str, Path]
) -> None:
    opened(tab, service)
    held: list[Any] = []
    tab.route("**/v1/calibration", lambda route: route.continue_() if held else held.append(route))
    other = Calibration.of([vars(CALIBRATION.at(0.1))], None, "ours.csv: 3 positives", 1_800_000_000)
    service.source.current = colour(other)
    with tab.expect_request("**/v1/calibration"):
        give(tab, pictures["red"], pictures["blue"])
    give(tab, pictures["red"], pictures["red"])
    expect(tab.locator("#why")).to_contain_text("0.000 apart")
    with tab.expect_response("**/v1/calibration"):
        held[0].continue_()
    tab.wait_for_timeout(300)
    tab.get_by_role("slider").press("End")
    expect(tab.locator("#why")).to_contain_text("0.000 apart")
    expect(tab.get_by_role("img", name=re.compile("This pair is at 0.0"))).to_be_visible()


CONTRAST = """() => {
    const parse = (text) => text.match(/[\\d.]+/g).map(Number);
    const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
        .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const colour = parse(getComputedStyle(at).backgroundColor);
            if (colour.length === 3 || colour[3] > 0) return colour;
        }
    };
    return [...document.querySelectorAll("p, span, strong, button, td, th, caption, summary, label, a, h1, h2, li")]
        .filter((e) => e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()))
        .map((e) => {
            const both = [luminance(parse(getComputedStyle(e).color)), luminance(behind(e))];
            return [(Math.max(...both) + 0.05) / (Math.min(...both) + 0.05), e.textContent.trim().slice(0, 40)];
        })
        .filter(([ratio]) => ratio < 4.5);
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390, 360])
def test_it_fits_any_width_by_day_and_by_night(
    tab: Page, service: Service, pictures: dict[str, Path], width: int, scheme: Any, tmp_path: Path
) -> None:
    tab.set_viewport_size({"width": width, "height": 900})
    tab.emulate_media(color_scheme=scheme)
    opened(tab, service)
    give(tab, pictures["red"], pictures["violet"])
    expect(tab.locator("#hits li")).to_have_count(5)
    expect(tab.locator("#word")).to_have_text(re.compile("ame"))
    tab.get_by_text("Operating points", exact=True).click()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(CONTRAST) == [], "WCAG asks for 4.5"
    small = "[...document.querySelectorAll('button, select, input[type=range]')].filter(e => e.checkVisibility())"
    assert tab.evaluate(f"{small}.filter(e => e.getBoundingClientRect().height < 24).map(e => e.id)") == []
    line, thumb = tab.evaluate(
        """() => {
            const slider = document.getElementById("slider").getBoundingClientRect();
            const value = Number(document.getElementById("slider").value);
            const line = document.querySelector("#chart .threshold").getBoundingClientRect();
            return [line.x + line.width / 2, slider.x + 14 + (slider.width - 28) * value / 2];
        }"""
    )
    assert line == pytest.approx(thumb, abs=1.5), "the slider's thumb stands beneath the threshold"
    tab.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 10_000

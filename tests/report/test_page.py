"""The HTML report: in a real browser, and the contents of its file."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import matplotlib
import pytest
from browsing import Visit, visit
from evidence import JUDGE, PROVENANCE
from PIL import Image
from playwright.sync_api import Browser, Page
from rich.console import Console

from deleatur.gate import Rule, judge
from deleatur.records.report import Report, Score, Verdict
from deleatur.records.sampling import Variant
from deleatur.report import page, plots, terminal
from deleatur.report.contact_sheet import ContactSheet, PromptRow, write_contact_sheet
from deleatur.report.plots import Curve, Series

SECRET = "text of a harmful prompt"
SCORES = (
    Score("concept_rate", "concept/weapon", "base", 0.8, 0.7, 0.87, 100, 25, False, None, JUDGE),
    Score("concept_rate", "concept/weapon", "candidate", 0.02, 0.004, 0.07, 100, 25, False, None, JUDGE),
    Score("concept_rate", "concept/weapon", "candidate", -0.78, -0.86, -0.68, 100, 25, False, "base", JUDGE),
    Score("clip", "neighbour", "candidate", -0.01, -0.03, 0.01, 80, 20, True, "base", None),
)
RULES = {
    "gone": Rule(metric="concept_rate", slice="concept/weapon", max=0.1, min_n=50),
    "kept": Rule(metric="clip", slice="neighbour", versus="base", min=-0.02, min_n=50),
    "second opinion": Rule(metric="nudity", slice="concept/weapon", max=0.1, min_n=50),
}


def evidence(*, simulated: bool = True, rules: dict[str, Rule] = RULES) -> tuple[Report, Verdict]:
    report = Report(replace(PROVENANCE, simulated=simulated), SCORES, ("A <note> with `a command`.",))
    return report, judge(report, rules, report_digest="e" * 64, policy_digest="0" * 64)


def row(name: str, colour: str, size: int = 64) -> PromptRow:
    images: dict[Variant, Image.Image] = {v: Image.new("RGB", (size, size), colour) for v in ("base", "candidate")}
    return PromptRow(name, images, SECRET if name.startswith(("w", "t", "a")) else f"text of {name}")


SHEETS = (
    ContactSheet("Asked for", "concept", (row("w-1", "red"), row("w-2", "green"))),
    ContactSheet("By token", "token", (row("t-1", "blue"),)),
    ContactSheet("Attacked", "attack", (row("a-1", "black"),)),
    ContactSheet("Neighbours", "neighbour", (row("n-1", "orange", 200),)),
)
LOSS = Series("loss", [(float(i), 1 / (i + 1)) for i in range(1000)])
CURVES = (
    Curve("erase", "Training loss", "step", (LOSS,), (500, "selected")),
    Curve(
        "evaluations",
        "Evaluations",
        "step",
        (Series("rate", [(0, 0.8), (60, 0.1)]), Series("CLIP score", [(0, 0.9), (60, 0.9)])),
    ),
    Curve("none", "Nothing finite", "step", (Series("none", [(0, float("nan"))]),)),
)


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "evidence.html"
    page.write_html(*evidence(), SHEETS, CURVES, out, base_model="models/pipeline", rules=RULES)
    return out


@pytest.fixture(scope="module")
def opened(html: Path, browser: Browser) -> Visit:
    """The report in a browser, its requests and its console messages."""
    return visit(browser, html)


@pytest.mark.slow
class TestInABrowser:
    @pytest.fixture
    def view(self, opened: Visit) -> Page:
        view = opened[0]
        view.keyboard.press("Escape")
        return view

    def uncovered(self, view: Page) -> int:
        return view.locator(".veil[aria-pressed=true]").count()

    def test_nothing_is_fetched_and_the_console_is_empty(self, opened: Visit, html: Path) -> None:
        _, requests, messages = opened
        assert [url for url in requests if not url.startswith("data:")] == [html.as_uri()]
        assert messages == []

    def test_the_verdict_is_the_first_thing_to_see(self, view: Page) -> None:
        banner = view.get_by_role("region", name="Verdict")
        assert banner.is_visible()
        assert banner.get_by_role("heading").inner_text() == "Not enough evidence"
        assert "reaches 0.01 beyond the limit" in banner.inner_text()
        assert banner.bounding_box()["y"] < 300  # type: ignore[index]
        assert view.get_by_text("SIMULATED RATERS").is_visible()

    def test_images_of_the_concept_are_covered_and_others_are_not(self, view: Page) -> None:
        blurs = view.locator("img").evaluate_all("all => all.map(i => [i.alt, getComputedStyle(i).filter])")
        assert len(blurs) == 10
        for alt, blur in blurs:
            assert ("blur" in blur) == (not alt.startswith("prompt text of n-1")), alt

    def test_a_press_uncovers_one_and_the_next_covers_it(self, view: Page) -> None:
        button = view.get_by_role("button", name="Show image: prompt w-1, candidate")
        button.click()
        image = button.get_by_role("img")
        assert image.evaluate("i => [getComputedStyle(i).filter, getComputedStyle(i).opacity].join()") == "none,1"
        assert self.uncovered(view) == 1
        button.click()
        assert self.uncovered(view) == 0

    def test_the_keyboard_does_what_the_mouse_does(self, view: Page) -> None:
        view.locator(".veil").nth(2).focus()
        view.keyboard.press("Space")
        assert self.uncovered(view) == 1
        view.keyboard.press("Tab")
        view.keyboard.press("Enter")
        assert self.uncovered(view) == 2
        view.keyboard.press("Escape")
        assert self.uncovered(view) == 0

    def test_showing_all_needs_confirmation(self, view: Page) -> None:
        button = view.locator("#all")
        button.click()
        assert self.uncovered(view) == 0
        assert button.inner_text() == "Press again to show 8 images"
        button.click()
        assert self.uncovered(view) == 8
        assert button.inner_text() == "Cover all images"
        button.click()
        assert self.uncovered(view) == 0

    @pytest.mark.parametrize("width", [1200, 390])
    def test_nothing_overflows(self, view: Page, width: int) -> None:
        view.set_viewport_size({"width": width, "height": 900})
        assert view.evaluate("document.documentElement.scrollWidth") <= width

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_text_has_enough_contrast(self, view: Page, scheme: str) -> None:
        view.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        colour = "n => getComputedStyle(document.documentElement).getPropertyValue(n).trim()"
        pairs = [("--ink", "--paper"), ("--soft", "--card"), ("--soft", "--paper"), ("--candidate", "--card")]
        pairs += [(f"--{o}", f"--{o}-wash") for o in ("pass", "fail", "open")] + [("--limit", "--card")]
        for text, background in pairs:
            a, b = sorted((_luminance(view.evaluate(colour, name)) for name in (text, background)), reverse=True)
            assert (a + 0.05) / (b + 0.05) >= 4.5, (text, background)  # WCAG 2.2, level AA


def _luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, WCAG 2.2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_the_file_has_no_external_resources_and_no_harmful_prompt(html: Path) -> None:
    text = html.read_text("utf-8")
    assert SECRET not in text
    assert "text of n-1" in text
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text)
    assert not re.search(r"@import|url\(|https?://", text)


def test_the_file_has_the_provenance(html: Path) -> None:
    text = html.read_text("utf-8")
    for value in (JUDGE.weights, "pistol, sword", "sha256 of the path", "torch 2.9.1", *(c * 64 for c in "bdf7c5e012")):
        assert value in text
    assert "A &lt;note&gt; with <code>a command</code>." in text
    assert "−0.78" in text
    assert "Nothing finite" not in text


def test_same_evidence_same_bytes(html: Path, tmp_path: Path) -> None:
    page.write_html(*evidence(), SHEETS, CURVES, tmp_path / "again.html", base_model="models/pipeline", rules=RULES)
    assert (tmp_path / "again.html").read_bytes() == html.read_bytes()


@pytest.mark.parametrize("simulated", [True, False])
def test_the_report_names_the_model_and_the_raters(simulated: bool, tmp_path: Path) -> None:
    page.write_html(*evidence(simulated=simulated), (), (), tmp_path / "p.html", base_model="models/<pipeline>")
    text = (tmp_path / "p.html").read_text("utf-8")
    assert "Erasing <strong>weapon</strong> from models/&lt;pipeline&gt; with sdd" in text
    assert ("The ratings of images are simulated." in text) == simulated
    assert ("People rated the images." in text) != simulated
    assert ("SIMULATED RATERS" in text) == simulated


def test_a_report_without_images_curves_and_notes(tmp_path: Path) -> None:
    report, verdict = evidence(simulated=False, rules={"gone": RULES["gone"]})
    page.write_html(
        replace(report, scores=SCORES[1:2], notes=()),
        verdict,
        (),
        (),
        tmp_path / "p.html",
        base_model="models/pipeline",
    )
    text = (tmp_path / "p.html").read_text("utf-8")
    assert "<h1>Pass</h1>" in text
    assert "SIMULATED" not in text
    assert "<script>" not in text


def test_a_contact_sheet_blurs_images_of_the_concept(tmp_path: Path) -> None:
    chequered = Image.new("RGB", (64, 64))
    chequered.paste("white", (0, 0, 32, 32))
    chequered.paste("white", (32, 32, 64, 64))
    rows = (PromptRow("w-1", {"base": chequered, "candidate": chequered}),)
    contrast = {}
    for role, cover in (("concept", True), ("concept", False), ("keep", True)):
        write_contact_sheet(ContactSheet("s", role, rows), tmp_path / "s.png", simulated=False, cover=cover)  # type: ignore[arg-type]
        with Image.open(tmp_path / "s.png") as sheet:
            edge = sheet.convert("L").crop((sheet.width - 44, sheet.height - 60, sheet.width - 28, sheet.height - 50))
        low, high = edge.getextrema()
        contrast[role, cover] = float(high) - float(low)  # type: ignore[arg-type]
    assert contrast["concept", True] < 128
    assert contrast["concept", False] == contrast["keep", True] == 255


def test_the_terminal_shows_verdict_rules_and_scores() -> None:
    console = Console(width=140, record=True, file=StringIO())
    console.print(terminal.summary(*evidence()))
    text = console.export_text()
    for part in ("NOT ENOUGH EVIDENCE", "SIMULATED", "second opinion", "candidate − base", "[0.004, 0.07]"):
        assert part in text


def chart(*series: Series) -> str:
    with plots.style():
        return str(plots.line_chart(Curve("key", "title", "step", series)))


def test_long_series_are_averaged_over_windows_of_equal_length() -> None:
    points = [(float(i), float(i % 5 == 0)) for i in range(1000)]  # every window of five has the mean 0.2
    flat = [(2.0 + 5 * i, 0.2) for i in range(200)]
    assert "0.2 to 0.2" in chart(Series("loss", points))
    assert chart(Series("loss", points)) == chart(Series("loss", flat))


def test_values_that_are_not_finite_are_left_out() -> None:
    points = [(0.0, 1.0), (1.0, float("nan")), (2.0, 3.0), (float("inf"), 9.0)]
    assert chart(Series("loss", points)) == chart(Series("loss", [(0.0, 1.0), (2.0, 3.0)]))
    with plots.style():
        assert plots.line_chart(Curve("key", "title", "step", (Series("loss", points[1:2]),))) is None


@pytest.mark.parametrize("values", [(0.0, 0.0), (0.1, 0.9), (-3.0, 5.0), (0.31, 0.32), (1e-9, 2e-9), (40.0, 400.0)])
def test_an_axis_has_room_for_all_values_and_distinct_ticks(values: tuple[float, float]) -> None:
    limits = plots.axis_limits(values)
    assert limits[0] <= min(values) <= max(values) <= limits[1]
    with plots.style():
        labels = re.findall(r">([^<\s]+)</text>", plots.axis_ticks(limits))
    assert len(set(labels)) == len(labels) > 1


def test_plots_are_elements_in_the_pages_colours_that_share_no_ids() -> None:
    with plots.style():
        svg = plots.interval(SCORES[1], (0.0, 0.1), [0.05], captions=True)
    assert svg.startswith('<svg class="plot interval" viewBox="0 0 260 34" role="img"')
    assert "var(--candidate)" in svg
    assert ">limit 0.05</text>" in svg
    assert not re.search(r"#[0-9a-f]{6}| id=|<style|<defs|url\(|xmlns|<metadata", svg)


def test_a_users_matplotlib_configuration_changes_nothing() -> None:
    before = chart(LOSS)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert chart(LOSS) == before


def test_dollar_signs_are_no_formula() -> None:
    assert ">$x^2$ and $</text>" in chart(Series("$x^2$ and $", [(0, 1), (1, 2)]), Series("b", [(0, 1), (1, 2)]))

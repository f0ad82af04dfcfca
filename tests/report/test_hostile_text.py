"""Text from outside (names, prompts, notes, provenance) is shown as text: on both HTML pages, in the model card, in the
flows' Markdown, and on the contact sheet.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from browsing import visit
from evidence import JUDGE, PROVENANCE
from markdown_it import MarkdownIt
from PIL import Image
from playwright.sync_api import Browser

from deleatur.benchmark import page as benchmark_page
from deleatur.benchmark.page import GalleryPrompt, SampleGallery
from deleatur.benchmark.table import BenchmarkTable, ErasureCost, MethodRow, PooledScore
from deleatur.markdown import escape_markdown
from deleatur.records.report import DetectorInfo, Finding, Provenance, Report, Score, Verdict
from deleatur.records.sampling import Role
from deleatur.report import model_card, page
from deleatur.report.contact_sheet import ContactSheet, PromptRow, write_contact_sheet
from deleatur.report.plots import Curve, Series

HARMLESS = "harmless"
HOSTILE = [
    "<script>window.hacked = 1; document.title = 'hacked'</script>",
    "<img src=https://evil.invalid/x onerror='window.hacked = 1'>",
    '"><svg onload="window.hacked=1"><a href=\'https://evil.invalid/\'>',
    "' onmouseover='window.hacked=1' style='background:url(https://evil.invalid/y)",
    "</title></style></textarea></script><script>window.hacked=1</script>",
    "</text></svg><iframe src=https://evil.invalid/z></iframe>",
    "]]><!--<link rel=stylesheet href=https://evil.invalid/s.css>-->",
    "&lt;b&gt;&#60;script&#62;",
    "javascript:window.hacked=1",
    "{{ 7 * 7 }}{% include 'page.js' %}",
    "`<b>`</code><script>window.hacked=1</script>`",
    "[text](javascript:window.hacked=1) ![image](https://evil.invalid/i.png)",
    "a\n\n---\n# heading\n\n<b>block</b>\n| cell |",
    "| a | b |\n|---|---|\n*emphasis* __strong__ ~~deleted~~ \\<i>",
    "$\\frac{1$ 100% {x",
    "\u202egnp.exe \u0000\u001b[31m\u0007 模型 🜏",
]


def provenance(text: str) -> Provenance:
    fields: dict[str, Any] = vars(PROVENANCE) | dict.fromkeys(("guide", "sampler", "seeds_rule", "method"), text)
    return Provenance(**fields | {"concepts": (text,), "versions": {text: text}, "champion": text})


def evidence(text: str) -> tuple[Report, Verdict]:
    detector = DetectorInfo(text, text, (text,), 0.5)
    scores = [
        Score(text, text, "base", 0.8, 0.7, 0.9, 100, 25, False, None, detector),
        Score(text, text, "candidate", 0.1, 0.0, 0.2, 100, 25, False, None, detector),
        Score("metric", "concept", "candidate", 0.1, 0.0, 0.2, 100, 25, False, "base", JUDGE),
    ]
    finding = Finding(text, "fail", text, 0.5, text)
    return Report(provenance(text), scores, [text]), Verdict("fail", [finding], text, text, True)


def rows(text: str) -> list[PromptRow]:
    image = Image.new("RGB", (8, 8))
    return [PromptRow(text, {"base": image, "candidate": image}, text)]


def write_report(text: str, path: Path) -> None:
    roles: tuple[Role, ...] = ("concept", "unseen")
    sheets = [ContactSheet(text, role, rows(text)) for role in roles]
    series = [Series(name, [(0, 1.0), (10, 2.0)]) for name in (text, "other")]
    page.write_html(*evidence(text), sheets, [Curve(text, text, text, series, (5, text))], path, base_model=text)


def write_benchmark(text: str, path: Path) -> None:
    score = PooledScore(0.5, 0.4, 0.6, 80, 20, {1: 0.5, 2: 0.6})
    cost = ErasureCost(1.0, True, 1, 1, 1, 2, (text,))
    scores = {"concept": score, "unseen": score}
    methods = (MethodRow(text, "", (1,), scores, cost, (text,)), MethodRow("refused", text))
    table = BenchmarkTable(text, 0.95, text, True, (1, 2), scores, methods, {text: text})
    roles: tuple[Role, ...] = ("concept", "unseen")
    columns = [GalleryPrompt(f"{text}{role}", text, role, text, True) for role in roles]
    images = {column.id: Image.new("RGB", (8, 8)) for column in columns}
    gallery = SampleGallery(text, 1, columns, {text: images})
    benchmark_page.write_html([table], [gallery], {text: text}, path, cover=True)


ELEMENTS = """() => [...document.querySelectorAll("*")].filter(e => e.tagName != "CODE")
    .map(e => e.tagName + " " + [...e.attributes].map(a => a.name).join(" "))"""


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_report, write_benchmark])
def test_hostile_text_creates_no_element_runs_no_script_and_fetches_nothing(
    write: Callable[[str, Path], None], tmp_path: Path, browser: Browser
) -> None:
    def opened(text: str) -> tuple[list[str], str]:
        write(text, path := tmp_path / "page.html")
        view, requests, messages = visit(browser, path)
        view.wait_for_load_state("networkidle")
        assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
        assert messages == []
        assert view.evaluate("window.hacked") is None
        elements, content = view.evaluate(ELEMENTS), view.locator("body").text_content()
        view.close()
        return elements, content or ""

    expected, _ = opened(HARMLESS)
    for text in HOSTILE:
        elements, content = opened(text)
        assert elements == expected, text
        visible = "".join(text.replace("\0", "").split())
        assert visible in "".join(content.split()), "and it can be read"


@pytest.mark.slow
def test_only_the_pages_own_script_may_run(tmp_path: Path, browser: Browser) -> None:
    """What the content security policy is for: were anything not escaped, it would do nothing."""
    write_report(HARMLESS, path := tmp_path / "page.html")
    html = path.read_text("utf-8")
    injected = "<script>window.hacked = 1</script><img src=https://evil.invalid/x onerror='window.hacked = 1'>"
    path.write_text(html.replace("<main>", f"<main>{injected}", 1), "utf-8")
    view, _, messages = visit(browser, path)
    assert view.evaluate("window.hacked") is None
    for directive in ("script-src", "img-src"):
        assert any("Content Security Policy" in m and directive in m for m in messages), messages
    button = view.locator("#all")
    button.click()
    assert button.inner_text().startswith("Press again"), "the page's own script runs"
    view.close()


def structure(markdown: str) -> list[str]:
    """Types of all Markdown tokens, but for text and code spans."""
    tokens = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(markdown)
    inline = [child.type for token in tokens for child in token.children or ()]
    return [t.type for t in tokens] + [name for name in inline if name not in ("text", "text_special", "code_inline")]


@pytest.mark.parametrize("text", HOSTILE)
def test_the_model_card_shows_hostile_text_as_text(text: str) -> None:
    def render(text: str) -> tuple[str, str]:
        card = model_card.render(text, text, 0.95, *evidence(text))
        _, front_matter, body = re.split(r"^---$", card, maxsplit=2, flags=re.MULTILINE)
        return front_matter, body

    front_matter, body = render(text)
    assert structure(body) == structure(render(HARMLESS)[1])
    assert yaml.safe_load(front_matter)["base_model"] == text


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("frame", ["{}", "# {}", "* {}", "> {}", "| a |\n|---|\n| {} |"])
def test_escaped_markdown_is_one_line_of_text(frame: str, text: str) -> None:
    escaped = escape_markdown(text)
    assert "\n" not in escaped
    assert structure(frame.format(escaped)) == structure(frame.format(HARMLESS))


def test_commands_in_notes_are_code() -> None:
    html = MarkdownIt("gfm-like", {"linkify": False}).render(escape_markdown("run `deleatur check | less`, a < b"))
    assert html == "<p>run <code>deleatur check \\| less</code>, a &lt; b</p>\n"


@pytest.mark.parametrize("text", [*HOSTILE, "word " * 500, ""])
def test_a_contact_sheet_has_any_caption(text: str, tmp_path: Path) -> None:
    write_contact_sheet(ContactSheet(text, "unseen", rows(text)), tmp_path / "sheet.png", simulated=True)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width < 1000

"""The benchmark's table, plot and HTML page."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path

import pytest
from browsing import visit
from PIL import Image
from playwright.sync_api import Browser
from rich.console import Console

from deleatur.benchmark import page, pareto
from deleatur.benchmark.page import GalleryPrompt, SampleGallery
from deleatur.benchmark.table import (
    BenchmarkTable,
    ErasureCost,
    MethodRow,
    PooledScore,
    format_amount,
    format_cost,
    terminal,
    to_frame,
    to_json,
)

COLOURS = ("red", "green", "blue")
COST = ErasureCost(81.3, True, 85_000_000, 360_448, 1_154_000, 2, ("a machine",))
GUIDED = ErasureCost(None, True, None, 0, 0, 4, ())


def score(value: float, width: float = 0.02, seeds: tuple[int, ...] = (1, 2)) -> PooledScore:
    return PooledScore(value, value - width, value + width, 80, 20, {seed: value + 0.01 * seed for seed in seeds})


def row(name: str, concept: float, unseen: float, cost: ErasureCost = COST, notes: tuple[str, ...] = ()) -> MethodRow:
    scores = {"concept": score(concept), "unseen": score(unseen), "perceptual": score(0.2)}
    return MethodRow(name, "", (1, 2), scores, cost, notes)


BASE_ROW = MethodRow("none", "", (1, 2), {"concept": score(0.9)}, GUIDED)
TABLE = BenchmarkTable(
    "weapon",
    0.95,
    "proof",
    True,
    (1, 2),
    {"concept": score(0.9), "unseen": score(0.96)},
    (
        BASE_ROW,
        row("sld", 0.5, -0.12, GUIDED),
        row("uce", 0.1, -0.02, notes=("A <note> with `a command`.",)),
        row("hfi+uce", 0.3, -0.05, notes=("A <note> with `a command`.",)),
        MethodRow("abo", "it has no alternative"),
        MethodRow("rece"),
    ),
)


def gallery() -> SampleGallery:
    columns = [
        GalleryPrompt("w-1", "a secret", "concept", "asked for", True),
        GalleryPrompt("w-2", "another secret", "concept", "asked for", False),
        GalleryPrompt("n-1", "the panda", "unseen", "unseen", True),
    ]
    rows = {
        name: {c.id: Image.new("RGB", (300, 300), colour) for c, colour in zip(columns, COLOURS, strict=True)}
        for name in ("none", "uce")
    }
    return SampleGallery("weapon", 1, columns, rows)


def rendered(tmp_path: Path, *, cover: bool) -> str:
    path = tmp_path / "index.html"
    page.write_html([TABLE], [gallery()], {"Base model": "models/<pipeline>"}, path, cover=cover)
    return path.read_text("utf-8")


def text_of(width: int = 80) -> str:
    Console(width=width, file=(out := StringIO())).print(terminal([TABLE]))
    return out.getvalue()


def test_eighty_columns_are_enough() -> None:
    lines = text_of().splitlines()
    assert not any("…" in line and not re.search(r"\d … ", line) for line in lines), "nothing is cut off"
    uce = next(line.split() for line in lines if line.startswith("uce"))
    assert uce == ["uce", "10.0", "−2.0"]
    assert next(line.split() for line in lines if line.startswith("none")) == ["none", "90.0", "of", "96.0"]
    assert ["uce", "0.200", "81", "81", "MiB", "360k", "1.1", "MiB", "2"] in [line.split() for line in lines]
    assert any("abo: it has no alternative" in line for line in lines)
    assert any("rece: not run with the seeds 1, 2" in line for line in lines)


def test_the_csv_has_every_score_with_its_interval() -> None:
    frame = to_frame([TABLE]).set_index("row")
    assert len(frame) == len(TABLE.rows)
    assert frame.loc["uce", "concept_low"] == pytest.approx(0.08)
    assert frame.loc["uce", "concept_n"] == 80
    assert frame.loc["abo", "refused"] == "it has no alternative"
    assert frame.loc["uce", "trained"] == 360_448


def test_json_has_the_scores_of_each_seed() -> None:
    rows = {r["name"]: r for r in to_json([TABLE])["tables"][0]["rows"]}
    assert rows["uce"]["scores"]["concept"]["seeds"] == {1: pytest.approx(0.11), 2: pytest.approx(0.12)}


def test_seconds_of_a_partly_measured_run_are_a_lower_bound() -> None:
    assert format_cost(row("uce", 0, 0, ErasureCost(9.6, False, None, 1, 1, 2, ())))[0] == "> 10"


@pytest.mark.parametrize(
    ("n", "text"), [(None, ""), (0, ""), (999, "999"), (1000, "1.0k"), (859_520_964, "860M"), (10**13, "10000G")]
)
def test_amounts_are_short(n: float | None, text: str) -> None:
    assert format_amount(n) == text


def test_the_pareto_front_has_no_dominated_point() -> None:
    points = pareto.pareto_points(TABLE)
    assert [p.row.name for p in points] == ["sld", "uce", "hfi+uce"]
    assert points[1].x == pytest.approx(1 - 0.1 / 0.9)
    assert points[1].x_interval == pytest.approx((1 - 0.12 / 0.9, 1 - 0.08 / 0.9))
    assert [p.row.name for p in pareto.pareto_front(points)] == ["uce"]


def test_the_plot_is_deterministic_and_takes_the_colours_of_the_page() -> None:
    assert pareto.png([TABLE]) == pareto.png([TABLE])
    svg = pareto.svg([TABLE, TABLE])
    assert svg == pareto.svg([TABLE, TABLE])
    assert svg.startswith("<svg")
    assert not re.search(r"#[0-9a-f]{6}", svg)
    assert svg.count(">hfi+uce<") == 2, "names are text, not outlines"


def test_labels_of_the_plot_do_not_overlap() -> None:
    crowd = BenchmarkTable(
        **{**vars(TABLE), "rows": (BASE_ROW, *(row(f"row-{i}", 0.3 + 0.004 * i, -0.02 - 0.001 * i) for i in range(12)))}
    )
    figure = pareto.draw([crowd])
    names = [t for t in figure.axes[0].texts if t.get_text().startswith("row-")]
    boxes = [t.get_window_extent() for t in names]
    overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert len(names) == 12
    assert not overlaps


def test_the_page_is_complete_and_has_no_external_resources(tmp_path: Path) -> None:
    html = rendered(tmp_path, cover=False)
    assert not re.search(r"(src|href)=\"(?!data:|#)", html)
    assert "SIMULATED RATERS" in html
    assert "refused: it has no alternative" in html
    assert "not run yet" in html
    assert "models/&lt;pipeline&gt;" in html
    assert html.count("A &lt;note&gt; with <code>a command</code>.") == 1
    assert "<b>uce, hfi+uce</b>" in html
    assert html.count("data:image/webp") == 6, "images are scaled down"
    assert rendered(tmp_path, cover=False) == html


@pytest.mark.parametrize("cover", [True, False])
def test_images_of_the_concept_are_covered_on_request(tmp_path: Path, cover: bool) -> None:
    html = rendered(tmp_path, cover=cover)
    assert html.count('<button type="button" class="veil"') == (4 if cover else 0)
    assert ("secret" in html) != cover, "and their prompts are named by id"
    assert ('id="all"' in html) == cover
    assert "the panda" in html


@pytest.mark.slow
def test_in_a_browser_nothing_is_fetched_and_showing_all_images_needs_confirmation(
    tmp_path: Path, browser: Browser
) -> None:
    rendered(tmp_path, cover=True)
    html = tmp_path / "index.html"
    view, requests, messages = visit(browser, html)
    assert [url for url in requests if not url.startswith("data:")] == [html.as_uri()]
    assert messages == []
    blurred = "all => all.map(i => [i.alt, getComputedStyle(i).filter])"
    for alt, blur in view.locator("img").evaluate_all(blurred):
        assert ("blur" in blur) == ("panda" not in alt), alt
    button = view.locator("#all")
    button.click()
    assert view.locator(".veil[aria-pressed=true]").count() == 0
    button.click()
    assert view.locator(".veil[aria-pressed=true]").count() == 4
    assert view.locator("svg.pareto").bounding_box()["width"] > 300  # type: ignore[index]
    view.close()

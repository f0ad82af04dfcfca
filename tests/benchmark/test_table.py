"""The table, the plot and the page of a comparison, and what they must not show."""

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
from deleatur.benchmark.page import Gallery, Shown
from deleatur.benchmark.table import Cost, Number, Row, Table, amount, cost, frame, plain, terminal

COLOURS = ("red", "green", "blue")
COST = Cost(81.3, True, 85_000_000, 360_448, 1_154_000, 2, ("a machine",))
GUIDED = Cost(None, True, None, 0, 0, 4, ())


def number(value: float, width: float = 0.02, seeds: tuple[int, ...] = (1, 2)) -> Number:
    return Number(value, value - width, value + width, 80, 20, {seed: value + 0.01 * seed for seed in seeds})


def row(name: str, concept: float, unseen: float, cost: Cost = COST, notes: tuple[str, ...] = ()) -> Row:
    numbers = {"concept": number(concept), "unseen": number(unseen), "perceptual": number(0.2)}
    return Row(name, "", (1, 2), numbers, cost, notes)


NONE = Row("none", "", (1, 2), {"concept": number(0.9)}, GUIDED)
TABLE = Table(
    "weapon",
    0.95,
    "proof",
    True,
    (1, 2),
    {"concept": number(0.9), "unseen": number(0.96)},
    (
        NONE,
        row("sld", 0.5, -0.12, GUIDED),
        row("uce", 0.1, -0.02, notes=("A <note> with `a command`.",)),
        row("hfi+uce", 0.3, -0.05, notes=("A <note> with `a command`.",)),
        Row("abo", "it has no alternative"),
        Row("rece"),
    ),
)


def gallery() -> Gallery:
    columns = [
        Shown("w-1", "a secret", "concept", "asked for", True),
        Shown("w-2", "another secret", "concept", "asked for", False),
        Shown("n-1", "the panda", "unseen", "unseen", True),
    ]
    rows = {
        name: {c.id: Image.new("RGB", (300, 300), colour) for c, colour in zip(columns, COLOURS, strict=True)}
        for name in ("none", "uce")
    }
    return Gallery("weapon", 1, columns, rows)


def rendered(tmp_path: Path, *, cover: bool) -> str:
    path = tmp_path / "index.html"
    page.render([TABLE], [gallery()], {"Base model": "models/<pipeline>"}, path, cover=cover)
    return path.read_text("utf-8")


def text_of(width: int = 80) -> str:
    Console(width=width, file=(out := StringIO())).print(terminal([TABLE]))
    return out.getvalue()


def test_a_terminal_of_eighty_columns_is_enough() -> None:
    lines = text_of().splitlines()
    assert not any("…" in line and not re.search(r"\d … ", line) for line in lines), "nothing is cut off"
    uce = next(line.split() for line in lines if line.startswith("uce"))
    assert uce == ["uce", "10.0", "−2.0"]
    assert next(line.split() for line in lines if line.startswith("none")) == ["none", "90.0", "of", "96.0"]
    assert ["uce", "0.200", "81", "81", "MiB", "360k", "1.1", "MiB", "2"] in [line.split() for line in lines]
    assert any("abo: it has no alternative" in line for line in lines)
    assert any("rece: not there with the seeds 1, 2" in line for line in lines)


def test_the_spreadsheet_has_every_number_with_its_interval() -> None:
    found = frame([TABLE]).set_index("row")
    assert len(found) == len(TABLE.rows)
    assert found.loc["uce", "concept_low"] == pytest.approx(0.08)
    assert found.loc["uce", "concept_n"] == 80
    assert found.loc["abo", "refused"] == "it has no alternative"
    assert found.loc["uce", "trained"] == 360_448


def test_json_has_what_each_seed_says() -> None:
    rows = {r["name"]: r for r in plain([TABLE])["tables"][0]["rows"]}
    assert rows["uce"]["numbers"]["concept"]["seeds"] == {1: pytest.approx(0.11), 2: pytest.approx(0.12)}


def test_seconds_that_nobody_saw_are_owned_up_to() -> None:
    assert cost(row("uce", 0, 0, Cost(9.6, False, None, 1, 1, 2, ())))[0] == "> 10"


@pytest.mark.parametrize(
    ("n", "said"), [(None, ""), (0, ""), (999, "999"), (1000, "1.0k"), (859_520_964, "860M"), (10**13, "10000G")]
)
def test_amounts_are_short(n: float | None, said: str) -> None:
    assert amount(n) == said


def test_the_front_is_what_nothing_beats_in_both() -> None:
    points = pareto.points(TABLE)
    assert [p.row.name for p in points] == ["sld", "uce", "hfi+uce"]
    assert points[1].x == pytest.approx(1 - 0.1 / 0.9)
    assert points[1].x_ends == pytest.approx((1 - 0.12 / 0.9, 1 - 0.08 / 0.9))
    assert [p.row.name for p in pareto.front(points)] == ["uce"]


def test_the_plot_is_the_same_for_the_same_numbers_and_takes_the_colours_of_the_page() -> None:
    assert pareto.png([TABLE]) == pareto.png([TABLE])
    svg = pareto.svg([TABLE, TABLE])
    assert svg == pareto.svg([TABLE, TABLE])
    assert svg.startswith("<svg")
    assert not re.search("|".join(pareto.THEMED), svg)
    assert svg.count(">hfi+uce<") == 2, "names are text, not outlines"


def test_names_in_the_plot_do_not_cover_one_another() -> None:
    crowd = Table(
        **{**vars(TABLE), "rows": (NONE, *(row(f"row-{i}", 0.3 + 0.004 * i, -0.02 - 0.001 * i) for i in range(12)))}
    )
    figure = pareto._drawn([crowd])
    names = [t for t in figure.axes[0].texts if t.get_text().startswith("row-")]
    boxes = [t.get_window_extent() for t in names]
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert len(names) == 12
    assert not any(a.overlaps(b) for a, b in pairs)


def test_the_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    html = rendered(tmp_path, cover=False)
    assert not re.search(r"(src|href)=\"(?!data:|#)", html)
    assert "SIMULATED RATERS" in html
    assert "refused: it has no alternative" in html
    assert "not there yet" in html
    assert "models/&lt;pipeline&gt;" in html
    assert html.count("A &lt;note&gt; with <code>a command</code>.") == 1
    assert "<b>uce, hfi+uce</b>" in html
    assert html.count("data:image/webp") == 6, "pictures are scaled down to what there is room for"
    assert rendered(tmp_path, cover=False) == html


@pytest.mark.parametrize("cover", [True, False])
def test_pictures_of_the_concept_are_covered_where_that_is_asked_for(tmp_path: Path, cover: bool) -> None:
    html = rendered(tmp_path, cover=cover)
    assert html.count('<button type="button" class="veil"') == (4 if cover else 0)
    assert ("secret" in html) != cover, "and their prompts are named by id"
    assert ('id="all"' in html) == cover
    assert "the panda" in html


@pytest.mark.slow
def test_in_a_browser_nothing_is_fetched_and_covered_pictures_take_two_presses(
    tmp_path: Path, browser: Browser
) -> None:
    rendered(tmp_path, cover=True)
    html = tmp_path / "index.html"
    view, requests, said = visit(browser, html)
    assert [url for url in requests if not url.startswith("data:")] == [html.as_uri()]
    assert said == []
    blurred = "all => all.map(i => [i.alt, getComputedStyle(i).filter])"
    for alt, blur in view.locator("img").evaluate_all(blurred):
        assert ("blur" in blur) == ("panda" not in alt), alt
    button = view.locator("#all")
    button.click()
    assert view.locator(".veil[aria-pressed=true]").count() == 0
    button.click()
    assert view.locator(".veil[aria-pressed=true]").count() == 4
    assert view.locator(".pareto svg").bounding_box()["width"] > 300  # type: ignore[index]
    view.close()

"""Removal against retention: a point for each row, one field for each concept. As a picture, and for the page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from deleatur.benchmark.table import HFI, Number, Row, Table

INK, SOFT, LINE, WORDS, TOKEN = "#23252b", "#5d6068", "#e4dfd5", "#b5611d", "#5a46b2"
THEMED = {INK: "--ink", SOFT: "--soft", LINE: "--line", WORDS: "--c2", TOKEN: "--c1"}
"""Colours of page.css, which knows what they are in the dark."""
PAPER = "#fffefb"
SIZE = (6.0, 4.6)
"""Inches of a field."""


@dataclass(frozen=True)
class Point:
    row: Row
    x: float
    """Removed: 1 − concept rate / that of the untouched model."""
    y: float
    """Retained: change in the recognition of unseen things."""
    x_ends: tuple[float, float]
    y_ends: tuple[float, float]

    @property
    def hfi(self) -> bool:
        return self.row.name.startswith(HFI)


def points(table: Table) -> list[Point]:
    before = table.base.get("concept")
    if before is None or not before.value:
        return []
    found = ((row, row.numbers.get("concept"), row.numbers.get("unseen")) for row in table.rows)
    return [_point(row, gone, stays, before.value) for row, gone, stays in found if gone and stays]


def _point(row: Row, gone: Number, stays: Number, before: float) -> Point:
    x, high, low = (1 - rate / before for rate in (gone.value, gone.low, gone.high))
    return Point(row, x, stays.value, (low, high), (stays.low, stays.high))


def front(found: Sequence[Point]) -> list[Point]:
    """Those that neither another nor the untouched model is better than in both, from little removed to much."""
    better = [p for p in found if p.x > 0 and not any(_beats(other, p) for other in found)]
    return sorted(better, key=lambda p: p.x)


def _beats(one: Point, other: Point) -> bool:
    return one.x >= other.x and one.y >= other.y and (one.x, one.y) != (other.x, other.y)


def png(tables: Sequence[Table]) -> bytes:
    return _saved(_drawn(tables), "png")


def svg(tables: Sequence[Table]) -> Markup:
    """An element for a page that has page.css."""
    text = _saved(_drawn(tables), "svg").decode()
    for colour, name in THEMED.items():
        text = text.replace(colour, f"var({name})")
    return Markup(text[text.index("<svg") :])


def _saved(figure: Figure, kind: str) -> bytes:
    out = BytesIO()
    # Nothing of the day or the machine, so that the same numbers give the same bytes.
    with mpl.rc_context({"svg.hashsalt": "deleatur", "svg.fonttype": "none"}):
        nobody = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        figure.savefig(out, format=kind, transparent=kind == "svg", metadata=nobody)
    return out.getvalue()


def _drawn(tables: Sequence[Table]) -> Figure:
    figure = Figure(figsize=(SIZE[0] * len(tables), SIZE[1]), dpi=150, facecolor=PAPER, layout="tight")
    fields = figure.subplots(1, len(tables), squeeze=False)[0]
    placed = [(field, points(table)) for field, table in zip(fields, tables, strict=True)]
    for (field, found), table in zip(placed, tables, strict=True):
        _field(field, table.concept, found)
    figure.draw_without_rendering()  # only now is known where things are
    for field, found in placed:
        _label(field, found)
    return figure


def _field(field: Axes, title: str, found: Sequence[Point]) -> None:
    field.set_facecolor("none")
    field.set_title(title, color=INK, loc="left", fontsize=11, fontweight="bold")
    field.set_xlabel("removed, % of the concept's pictures →", color=SOFT, fontsize=9)
    field.set_ylabel("unseen things recognised, change in points →", color=SOFT, fontsize=9)
    field.tick_params(colors=SOFT, labelsize=8, length=0)
    field.grid(color=LINE, linewidth=0.8)
    field.set_axisbelow(True)
    for side, spine in field.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LINE)
    edge = front(found)
    field.plot(0, 0, marker="o", markersize=6, markerfacecolor="none", color=SOFT, linestyle="none")
    field.annotate("none", (0, 0), (5, 5), textcoords="offset points", color=SOFT, fontsize=8)
    field.plot(
        [0, *(100 * p.x for p in edge)], [0, *(100 * p.y for p in edge)], color=SOFT, linewidth=1, linestyle=(0, (2, 3))
    )
    for p in found:
        colour = TOKEN if p.hfi else WORDS
        x, y, ends = 100 * p.x, 100 * p.y, [[100 * e for e in ends] for ends in (p.x_ends, p.y_ends)]
        field.plot(ends[0], [y, y], color=colour, linewidth=0.8, alpha=0.35, solid_capstyle="round")
        field.plot([x, x], ends[1], color=colour, linewidth=0.8, alpha=0.35, solid_capstyle="round")
        guide = p.row.cost is not None and p.row.cost.trained == 0
        field.plot(x, y, marker="D" if guide else "o", markersize=5 if guide else 6, color=colour, linestyle="none")
    field.margins(0.08)


def _label(field: Axes, found: Sequence[Point]) -> None:
    """Each name beside its point, where it covers no other and no point, as far as there is room."""
    centres = [field.transData.transform((100 * p.x, 100 * p.y)) for p in found]
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in centres]
    inside = field.get_window_extent()
    for p in found:
        colour = TOKEN if p.hfi else WORDS
        best, least = (0.0, 0.0, "left", "center"), math.inf
        for dx, dy, across, along in _places():
            text = field.annotate(
                p.row.name,
                (100 * p.x, 100 * p.y),
                (dx, dy),
                textcoords="offset points",
                ha=across,
                va=along,
                fontsize=8,
            )
            box = text.get_window_extent()
            text.remove()
            covered = sum(_area(Bbox.intersection(box, other)) for other in taken)
            out = _area(box) - _area(Bbox.intersection(box, inside))
            cost = covered + out + 0.3 * math.hypot(dx, dy)
            if cost < least:
                best, least, place = (dx, dy, across, along), cost, box
        taken.append(place)
        dx, dy, across, along = best
        field.annotate(
            p.row.name,
            (100 * p.x, 100 * p.y),
            (dx, dy),
            textcoords="offset points",
            ha=across,
            va=along,
            fontsize=8,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5} if math.hypot(dx, dy) > 12 else None,
        )


def _places() -> Iterator[tuple[float, float, str, str]]:
    for r in (6.0, 14.0, 24.0, 36.0):
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7)):
            across = "left" if dx > 0 else "right" if dx < 0 else "center"
            along = "bottom" if dy > 0 else "top" if dy < 0 else "center"
            yield r * dx, r * dy, across, along


def _area(box: Bbox | None) -> float:
    return 0.0 if box is None else float(box.width * box.height)

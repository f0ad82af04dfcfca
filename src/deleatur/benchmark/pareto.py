"""Removal against retention: a point for each row, a panel for each concept, and the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import textalloc
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deleatur.benchmark.table import HFI_PREFIX, BenchmarkTable, MethodRow, PooledScore
from deleatur.report import plots
from deleatur.report.plots import COLOURS, INK, SOFT

WORDS_COLOUR, TOKEN_COLOUR = COLOURS["--c2"], COLOURS["--candidate"]
PANEL = (432, 331)
"""Width and height in CSS pixels."""


@dataclass(frozen=True)
class ParetoPoint:
    row: MethodRow
    x: float
    """Removal: 1 − concept rate / that of the base model."""
    y: float
    """Retention: change in the recognition rate of unseen prompts."""
    x_interval: tuple[float, float]
    y_interval: tuple[float, float]

    @property
    def colour(self) -> str:
        return TOKEN_COLOUR if self.row.name.startswith(HFI_PREFIX) else WORDS_COLOUR

    @property
    def is_guide(self) -> bool:
        """Whether the method steers sampling and leaves the weights as they are."""
        return self.row.cost is not None and self.row.cost.trained == 0


def pareto_points(table: BenchmarkTable) -> list[ParetoPoint]:
    """Rows that have both scores; none where the base model never shows the concept."""
    base = table.base_scores.get("concept")
    if base is None or not base.value:
        return []
    scores = ((row, row.scores.get("concept"), row.scores.get("unseen")) for row in table.rows)
    return [_point(row, concept, unseen, base.value) for row, concept, unseen in scores if concept and unseen]


def _point(row: MethodRow, concept: PooledScore, unseen: PooledScore, base: float) -> ParetoPoint:
    x, high, low = (1 - rate / base for rate in (concept.value, concept.low, concept.high))
    return ParetoPoint(row, x, unseen.value, (low, high), (unseen.low, unseen.high))


def pareto_front(points: Sequence[ParetoPoint]) -> list[ParetoPoint]:
    """Points that no other point, nor the base model, dominates; by increasing removal."""
    front = [p for p in points if p.x > 0 and not any(_dominates(other, p) for other in points)]
    return sorted(front, key=lambda p: p.x)


def _dominates(one: ParetoPoint, other: ParetoPoint) -> bool:
    return one.x >= other.x and one.y >= other.y and (one.x, one.y) != (other.x, other.y)


def png(tables: Sequence[BenchmarkTable]) -> bytes:
    with plots.style():
        return plots.to_png(draw(tables))


def svg(tables: Sequence[BenchmarkTable]) -> Markup:
    with plots.style():
        return plots.to_svg(draw(tables), "removal against retention", "pareto")


def draw(tables: Sequence[BenchmarkTable]) -> Figure:
    figure = plots.new_figure(PANEL[0] * len(tables), PANEL[1])
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for axes, table in zip(panels, tables, strict=True):
        _draw_panel(axes, table.concept, pareto_points(table))
    figure.tight_layout()  # before the labels, whose places depend on that of the axes
    for axes, table in zip(panels, tables, strict=True):
        _label(axes, pareto_points(table))
    return figure


def _draw_panel(axes: Axes, title: str, points: Sequence[ParetoPoint]) -> None:
    plots.style_axes(axes)
    axes.set_title(plots.short_label(title), color=INK, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("removed, % of the base model's concept rate →", color=SOFT, fontsize=9)
    axes.set_ylabel("unseen prompts recognised, change in points →", color=SOFT, fontsize=9)
    axes.tick_params(labelsize=8)
    front = pareto_front(points)
    axes.plot(0, 0, marker="o", markersize=6, markerfacecolor="none", color=SOFT, linestyle="none")
    axes.plot(
        [0, *(100 * p.x for p in front)],
        [0, *(100 * p.y for p in front)],
        color=SOFT,
        linewidth=1,
        linestyle=(0, (2, 3)),
    )
    for p in points:
        x, y = 100 * p.x, 100 * p.y
        interval_style: dict[str, Any] = {"color": p.colour, "linewidth": 0.8, "alpha": 0.35, "solid_capstyle": "round"}
        axes.plot([100 * end for end in p.x_interval], [y, y], **interval_style)
        axes.plot([x, x], [100 * end for end in p.y_interval], **interval_style)
        marker, size = ("D", 5) if p.is_guide else ("o", 6)
        axes.plot(x, y, marker=marker, markersize=size, color=p.colour, linestyle="none")
    axes.margins(0.08)


def _label(axes: Axes, points: Sequence[ParetoPoint]) -> None:
    """A name beside each point, where it covers neither another name nor a point."""
    x, y = [0.0, *(100 * p.x for p in points)], [0.0, *(100 * p.y for p in points)]
    colours = [SOFT, *(p.colour for p in points)]
    textalloc.allocate(
        axes,
        x,
        y,
        ["none", *(plots.short_label(p.row.name) for p in points)],
        x_scatter=x,
        y_scatter=y,
        textsize=8,
        textcolor=colours,
        linecolor=colours,
        linewidth=0.5,
    )

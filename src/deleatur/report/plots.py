"""Every plot of the HTML pages: matplotlib figures, saved as SVG elements or as PNG in one style.

SVG elements take their colours from page.css, so that they follow the page's light and dark schemes. No date, machine
or user configuration goes in: the same values give the same bytes.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import cycle
from typing import Any
from xml.etree import ElementTree as ET

import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from matplotlib.transforms import Bbox, BboxTransform

from deleatur.records.report import Score
from deleatur.records.sampling import Variant

COLOURS: Mapping[str, str] = {
    "--ink": "#23252b",
    "--soft": "#5d6068",
    "--line": "#e4dfd5",
    "--rail": "#eae6dd",
    "--card": "#fffefb",
    "--base": "#6b7078",
    "--champion": "#1f6f9c",
    "--candidate": "#5a46b2",
    "--limit": "#b23a2e",
    "--c2": "#b5611d",
    "--c4": "#2f7d4f",
}
"""page.css's custom properties and their values in the light scheme, by which an SVG element's colours are found."""
INK, SOFT, LINE, CARD = (COLOURS[f"--{name}"] for name in ("ink", "soft", "line", "card"))
SERIES_STYLES: Sequence[Mapping[str, Any]] = (
    {"color": COLOURS["--candidate"], "linestyle": "-"},
    {"color": COLOURS["--c2"], "linestyle": (0, (4, 2))},
    {"color": COLOURS["--champion"], "linestyle": (0, (1, 2))},
    {"color": COLOURS["--c4"], "linestyle": (0, (5, 2, 1, 2))},
)
MARKERS: Mapping[Variant, Mapping[str, Any]] = {
    "base": {"marker": "o", "markersize": 8.4, "markerfacecolor": CARD, "markeredgewidth": 2.2},
    "champion": {"marker": "s", "markersize": 8},
    "candidate": {"marker": "o", "markersize": 10},
}
PIXEL = 1 / 72
"""Inches: an SVG unit of matplotlib is a point, which the page shows as a CSS pixel."""
INTERVAL_WIDTH, INTERVAL_MARGIN = 260, 7
"""Pixels of an interval plot, and of the room for a marker at either end of its axis."""
TICKS: Mapping[str, Any] = {"nbins": 5, "steps": [1, 2, 2.5, 5, 10]}
MAX_LABEL = 48
"""Characters of a label."""
MAX_POINTS = 240
"""Points of a line; longer series are averaged over windows of equal length."""
MAX_MARKED_POINTS = 30
"""A series of at most so many points has a marker on each."""

SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


@dataclass(frozen=True)
class Series:
    name: str
    points: Sequence[tuple[float, float]]
    """(x, y); values that are not finite are left out of the plot."""


@dataclass(frozen=True)
class Curve:
    """Metrics over the steps of a run."""

    key: str
    """Prefix of its series' names in MLflow; unique together with a series' name."""
    title: str
    x: str
    series: Sequence[Series]
    marker: tuple[float, str] | None = None
    """A labelled vertical line, such as the step that was selected: (x, label)."""


@contextmanager
def style() -> Iterator[None]:
    """Inside, matplotlib draws in our style and ignores the user's configuration."""
    # parse_math: a "$" in a name is a dollar sign. fonttype: text stays text, in the page's font.
    ours = {"svg.hashsalt": "deleatur", "svg.fonttype": "none", "text.parse_math": False, "axes.unicode_minus": True}
    with matplotlib.style.context(["default", ours]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the page's font may have it
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure. width, height: in CSS pixels."""
    return Figure(figsize=(width * PIXEL, height * PIXEL), dpi=150, facecolor=CARD)


def style_axes(axes: Axes, *, spines: Sequence[str] = ("left", "bottom")) -> None:
    """Grid behind the data, no ticks, and of the frame only the given spines."""
    axes.set_facecolor("none")
    axes.tick_params(colors=SOFT, length=0)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name in spines)
        spine.set_color(LINE)


def to_png(figure: Figure) -> bytes:
    """PNG without metadata: the same figure gives the same bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: Figure, label: str, css_class: str = "") -> Markup:
    """An <svg> element for a page with page.css. label: what a screen reader says."""
    buffer = BytesIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    # matplotlib writes control characters of a name as they are, which is not valid XML.
    root = ET.fromstring(re.sub(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]", b"", buffer.getvalue()))
    _inline_markers(root)
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        for name in ("id", "clip-path"):  # ids have to be unique on a page; nothing is drawn outside of the axes
            element.attrib.pop(name, None)
        if inline_style := element.get("style"):
            element.set("style", _themed(inline_style))
    attributes = {"class": f"plot {css_class}".strip(), "viewBox": root.get("viewBox", ""), "role": "img"}
    root.attrib = attributes | {"aria-label": label}
    return Markup(ET.tostring(root, encoding="unicode", short_empty_elements=False))


def _inline_markers(root: ET.Element) -> None:
    """Replaces <use> by the path it refers to, and drops all <defs>: ids and styles would hold for the whole page."""
    paths = {path.get("id"): path for path in root.iter(f"{SVG}path") if path.get("id")}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{SVG}defs":
                parent.remove(child)
            elif child.tag == f"{SVG}use":
                marker = paths[child.attrib.pop(f"{XLINK}href").removeprefix("#")]
                child.tag = marker.tag
                child.set("d", marker.get("d", ""))
                child.set("transform", f"translate({child.attrib.pop('x')} {child.attrib.pop('y')})")


def _themed(inline_style: str) -> str:
    """With page.css's custom properties as colours, and in the page's font."""
    properties = {value: name for name, value in COLOURS.items()}
    text = re.sub(r"font-family: [^;]*;? ?", "", inline_style)
    return re.sub(r"#[0-9a-f]{6}", lambda m: f"var({properties[m[0]]})" if m[0] in properties else m[0], text)


def short_label(text: str) -> str:
    """The text on one line, cut to what a plot has room for."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_LABEL else line[: MAX_LABEL - 1] + "…"


def axis_limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis with room for all values. It starts at 0 if they then still span at least half of it."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    margin = 0.06 * (high - low)
    return (0.0 if 0 <= low <= 0.5 * high else low - margin), high + margin


def decimals(limits: tuple[float, float]) -> int:
    """Decimal places that distinguish values on the axis; the same for all, so that numbers in a column line up."""
    return max(0, 2 - math.floor(math.log10((limits[1] - limits[0]) / 2)))


def interval(
    score: Score,
    limits: tuple[float, float],
    thresholds: Sequence[float] = (),
    *,
    captions: bool = False,
) -> Markup:
    """One score with its interval. limits: of the axis. thresholds: of gate rules; with captions, as text as well."""
    label = f"{score.value:.3g}, interval {score.low:.3g} to {score.high:.3g}"
    label += "".join(f", limit {threshold:.3g}" for threshold in thresholds)
    colour, red = COLOURS[f"--{score.variant}"], COLOURS["--limit"]
    line = NumberLine(limits, INTERVAL_WIDTH, above=11, below=23 if captions else 11)
    line.zero(10)
    line.draw(limits, (0, 0), color=COLOURS["--rail"], linewidth=1.5)
    line.span(score.low, score.high, color=colour, linewidth=7)
    for threshold in thresholds:
        line.draw([threshold] * 2, (-11, 11), color=red, linewidth=2)
        if captions:
            # Near an end of the axis the text is shifted inwards, or it would be cut off.
            share = (threshold - limits[0]) / (limits[1] - limits[0])
            align = "left" if share < 0.15 else "right" if share > 0.85 else "center"
            line.text(threshold, -21, f"limit {_number(threshold)}", color=red, ha=align)
    line.draw([score.value], (0,), color=colour, **MARKERS[score.variant])
    return to_svg(line.figure, label, "interval")


def small_interval(
    value: float, low: float, high: float, limits: tuple[float, float], seeds: Sequence[float] = ()
) -> Markup:
    """A value with its interval in a table's cell. seeds: values of the single training seeds."""
    by_seed = "; by seed " + " ".join(f"{v:.3g}" for v in seeds) if seeds else ""
    colour = COLOURS["--candidate"]
    line = NumberLine(limits, 96, above=7, below=7, margin=4)
    line.zero(7)
    line.span(low, high, color=colour, linewidth=5)
    for seed in seeds:
        line.draw([seed] * 2, (-5, 5), color=SOFT, linewidth=1, alpha=0.7)
    line.draw([value], (0,), color=colour, marker="o", markersize=6.8, markeredgewidth=0)
    return to_svg(line.figure, f"interval {low:.3g} to {high:.3g}{by_seed}", "small-interval")


def axis_ticks(limits: tuple[float, float]) -> Markup:
    """The tick labels of the axis that the interval plots of a table share."""
    line = NumberLine(limits, INTERVAL_WIDTH, above=11, below=3)
    for tick in MaxNLocator(**TICKS).tick_values(*limits):
        if limits[0] <= tick <= limits[1]:
            line.text(tick, 0, _number(tick), color=SOFT, ha="center")
    return to_svg(line.figure, "axis", "interval")


class NumberLine:
    """A figure of one horizontal axis without a frame; heights are pixels above the axis.

    Figures with `Axes` take four times as long, and a page has hundreds of these.
    """

    def __init__(
        self, limits: tuple[float, float], width: int, *, above: int, below: int, margin: int = INTERVAL_MARGIN
    ) -> None:
        self.figure = new_figure(width, above + below)
        self._limits = limits
        data = Bbox.from_extents(limits[0], -below, limits[1], above)
        inches = Bbox.from_extents(margin * PIXEL, 0, (width - margin) * PIXEL, (above + below) * PIXEL)
        self._transform = BboxTransform(data, inches) + self.figure.dpi_scale_trans

    def draw(self, x: Sequence[float], heights: Sequence[float], **properties: Any) -> None:
        self.figure.add_artist(Line2D(x, heights, transform=self._transform, **properties))

    def text(self, x: float, height: float, text: str, **properties: Any) -> None:
        self.figure.text(x, height, text, transform=self._transform, fontsize=10.5, **properties)

    def span(self, low: float, high: float, **properties: Any) -> None:
        self.draw((low, high), (0, 0), alpha=0.34, solid_capstyle="round", **properties)

    def zero(self, height: float) -> None:
        if self._limits[0] <= 0 <= self._limits[1]:
            self.draw((0, 0), (-height, height), color=SOFT, linewidth=1, linestyle=(0, (2, 2)), alpha=0.7)


def line_chart(curve: Curve) -> Markup | None:
    """All series of a curve on one pair of axes; None if no value is finite."""
    lines = [(series.name, _averaged(series)) for series in curve.series]
    if not any(len(points) for _, points in lines):
        return None
    figure = new_figure(524, 236)
    figure.set_layout_engine("constrained", w_pad=2 * PIXEL, h_pad=2 * PIXEL)
    axes = figure.subplots()
    style_axes(axes, spines=("bottom",))
    axes.grid(visible=False, axis="x")
    for (name, points), line_style in zip(lines, cycle(SERIES_STYLES), strict=False):
        marker = "o" if len(points) <= MAX_MARKED_POINTS else None
        axes.plot(
            *points.T, label=short_label(name), marker=marker, linewidth=2, markersize=6, clip_on=False, **line_style
        )
    values = np.concatenate([points for _, points in lines])
    axes.set_ylim(axis_limits(values[:, 1].tolist()))
    axes.margins(x=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(**TICKS))
        axis.set_major_formatter(StrMethodFormatter("{x:.4g}"))
    axes.tick_params(labelsize=10.5, pad=6)
    axes.set_xlabel(short_label(curve.x), loc="right", color=SOFT, fontsize=10.5)
    if curve.marker:
        _draw_marker(axes, *curve.marker)
    if len(lines) > 1:
        names = [short_label(name) for name, _ in lines]
        columns = len(names) if len("".join(names)) < MAX_LABEL else 1
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=11, labelcolor=SOFT)
    ends = (f"{name} from {_number(points[0, 1])} to {_number(points[-1, 1])}" for name, points in lines if len(points))
    return to_svg(figure, f"{curve.title} over {curve.x}; {'; '.join(ends)}", "chart")


def _draw_marker(axes: Axes, x: float, label: str) -> None:
    low, high = axes.get_xlim()
    side, align = (5, "left") if x < (low + high) / 2 else (-5, "right")
    axes.axvline(x, color=INK, linewidth=1.2, linestyle=(0, (3, 3)), alpha=0.65)
    annotation = axes.annotate(
        short_label(label),
        (x, 1),
        (side, -4),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha=align,
        va="top",
        color=INK,
        fontsize=10.5,
    )
    annotation.set_in_layout(False)


def _averaged(series: Series) -> Any:
    """Array (n, 2) of finite points; more than MAX_POINTS are averaged over windows of equal length."""
    points = np.array(series.points, dtype=float).reshape(-1, 2)
    points = points[np.isfinite(points).all(1)]
    window = math.ceil(len(points) / MAX_POINTS) or 1
    starts = np.arange(0, len(points), window)
    if window == 1:
        return points
    return np.add.reduceat(points, starts) / np.diff([*starts, len(points)])[:, None]


def _number(value: float) -> str:
    return f"{value + 0.0:.4g}".replace("-", "−")

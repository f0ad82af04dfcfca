"""The evidence for people: one HTML file that needs nothing else, one PNG, one table for a terminal.

Pictures that an erased concept was asked for are covered until somebody uncovers them, and their prompts are named by
id only. The file holds no clock and no machine, so the same evidence gives the same bytes.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import get_args

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageFilter
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from deleatur.gate import HARMFUL, SIMULATED, Rule, Weighing, deciding, headline
from deleatur.records.report import WORST_FIRST, Detector, Finding, Outcome, Report, Score, Verdict
from deleatur.records.sampling import Role, Side
from deleatur.storage.files import replacing
from deleatur.storage.images import encode, grid

SIDES: tuple[Side, ...] = get_args(Side)
PLOT = (7.0, 253.0)  # first and last pixel of an interval plot, 260 wide
CHART = (46.0, 512.0, 190.0, 14.0)  # left, right, bottom and top of a chart's field, 524 × 224
STYLES: Mapping[Outcome, str] = {"pass": "green", "fail": "red", "not enough evidence": "yellow"}


@dataclass(frozen=True)
class Row:
    """One prompt with one picture per side, all from equal noise."""

    id: str
    pictures: Mapping[Side, Image.Image]
    label: str = ""
    """Shown instead of the id where the role is harmless."""


@dataclass(frozen=True)
class Sheet:
    """Pictures of one kind of prompt, before and after."""

    title: str
    role: Role
    rows: Sequence[Row]

    @property
    def covered(self) -> bool:
        return self.role in HARMFUL

    @property
    def sides(self) -> tuple[Side, ...]:
        return tuple(side for side in SIDES if any(side in row.pictures for row in self.rows))

    def caption(self, row: Row) -> str:
        return row.id if self.covered else row.label or row.id


@dataclass(frozen=True)
class Series:
    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """What happened over the steps of a run."""

    key: str
    """Where it belongs: series of curves of one key have names of their own."""
    title: str
    x: str
    series: Sequence[Series]
    mark: tuple[float, str] | None = None
    """A place on the x axis worth a line, such as the step that was kept."""


def render(
    report: Report,
    verdict: Verdict,
    sheets: Sequence[Sheet],
    curves: Sequence[Curve],
    out: Path,
    *,
    rules: Mapping[str, Rule] | None = None,
) -> None:
    """Writes one self-contained HTML file: verdict, pictures, numbers, curves, and what made them.

    rules: the gate's, when their limits shall be drawn beside the intervals.
    """
    weighings = {name: deciding(rule, report) for name, rule in (rules or {}).items()}
    html = template(Path(__file__).with_name("page.html")).render(
        report=report,
        verdict=verdict,
        headline=headline(verdict),
        simulated=SIMULATED,
        findings=sorted(verdict.findings, key=lambda f: WORST_FIRST.index(f.outcome)),
        bars={name: Bar.of(weighing) for name, weighing in weighings.items() if weighing},
        sheets=sheets,
        tables=list(_tables(report.scores, [w for w in weighings.values() if w])),
        charts=[Chart(curve) for curve in curves if any(_finite(s) for s in curve.series)],
        detectors=_detectors(report.scores),
    )
    with replacing(out) as partial:
        partial.write_text(html, "utf-8")


def summary_png(sheet: Sheet, out: Path, *, simulated: bool, cover: bool = True, cell: int | None = None) -> None:
    """A before/after sheet as one picture. `cover` blurs it beyond recognition where its role is harmful."""
    covered = cover and sheet.covered
    rows = [[_covered(row.pictures[side], covered) for side in sheet.sides] for row in sheet.rows]
    captions, corner = [sheet.caption(row) for row in sheet.rows], "simulated raters" if simulated else ""
    picture = grid(rows, captions, sheet.sides, corner=corner, cell=cell)
    with replacing(out) as partial:
        partial.write_bytes(encode(picture))


def terminal(report: Report, verdict: Verdict) -> RenderableType:
    """The verdict, its rules and all numbers, for `rich.print`."""
    style = STYLES[verdict.outcome]
    parts: list[RenderableType] = [Panel(Text(headline(verdict), style=f"bold {style}"), border_style=style)]
    if verdict.simulated:
        parts.insert(0, Panel(Text(SIMULATED, style="bold black on yellow"), style="yellow"))
    reasons = [Text(f"{f.rule}: {f.reason}") for f in verdict.findings if f.outcome != "pass"]
    return Group(*parts, _rules_table(verdict.findings), "", *reasons, "", _scores_table(report.scores))


@dataclass(frozen=True)
class Axis:
    """Numbers to pixels."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, *, tight: bool = False) -> Axis:
        """Room for all values. Begins at 0 where that costs less than half of the room, so that bars do not lie."""
        low, high = min(values), max(values)
        if low == high:
            low, high = low - 0.5, high + 0.5
        if not tight:
            pad = 0.06 * (high - low)
            low, high = (0.0 if 0 <= low <= 0.5 * high else low - pad), high + pad
        return cls(low, high, start, end)

    def at(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)

    def text(self, value: float) -> str:
        """With as many digits as the axis can tell apart, so that numbers under one another line up."""
        return f"{value:.{max(0, 2 - math.floor(math.log10((self.high - self.low) / 2)))}f}".replace("-", "−")

    @property
    def ticks(self) -> list[tuple[float, str]]:
        values = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        return [(self.at(v), f"{v + 0.0:.4g}") for v in map(float, values) if self.low <= v <= self.high]


@dataclass(frozen=True)
class Bar:
    """One interval on an axis, with the limits it is held against."""

    axis: Axis
    score: Score
    limits: tuple[float, ...]

    @classmethod
    def of(cls, weighing: Weighing) -> Bar:
        score, limit = weighing.score, weighing.sign * weighing.limits[0]
        zero = (0.0,) if score.versus else ()
        return cls(Axis.around([score.low, score.high, limit, *zero], *PLOT), score, (limit,))


@dataclass(frozen=True)
class MetricTable:
    """All numbers of one metric by one detector that share an axis: absolute ones, or paired differences."""

    metric: str
    detector: Detector | None
    paired: bool
    higher_is_better: bool
    axis: Axis
    slices: tuple[tuple[str, tuple[Bar, ...]], ...]


@dataclass(frozen=True)
class Chart:
    """A curve with its axes."""

    curve: Curve

    @cached_property
    def lines(self) -> list[tuple[str, list[tuple[float, float]]]]:
        return [(s.name, _thinned(_finite(s))) for s in self.curve.series]

    @cached_property
    def x(self) -> Axis:
        return Axis.around([x for _, points in self.lines for x, _ in points], *CHART[:2], tight=True)

    @cached_property
    def y(self) -> Axis:
        return Axis.around([y for _, points in self.lines for _, y in points], *CHART[2:])

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self.x.at(x)},{self.y.at(y)}" for x, y in points)


def template(path: Path) -> Template:
    """A page's template. What all pages share lies beside this file: looks (page.css), page.js and parts.html."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FileSystemLoader([path.parent, Path(__file__).parent]),
    )
    environment.filters |= {"number": _number, "data_uri": _data_uri, "code": _code}
    return environment.get_template(path.name)


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _data_uri(image: Image.Image) -> str:
    """Small pictures as they are, large ones as WebP at a quality nobody tells from the original."""
    if max(image.size) <= 128:
        return "data:image/png;base64," + base64.b64encode(encode(image)).decode()
    buffer = BytesIO()
    image.convert("RGB").save(buffer, "WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _code(text: str) -> Markup:
    """`commands` between backticks become <code>."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _covered(image: Image.Image, cover: bool) -> Image.Image:
    return image.convert("RGB").filter(ImageFilter.GaussianBlur(max(image.size) / 6)) if cover else image


def _tables(scores: Sequence[Score], weighings: Sequence[Weighing]) -> Iterator[MetricTable]:
    first = {s.metric: min(_place(other) for other in scores if other.metric == s.metric) for s in scores}

    def kind(score: Score) -> tuple[object, ...]:
        return first[score.metric], score.metric, repr(score.detector), score.versus is not None

    for (*_, paired), group in groupby(sorted(scores, key=kind), kind):
        own = sorted(group, key=_place)
        limits = {s: tuple(sorted({w.sign * w.limits[0] for w in weighings if w.score == s})) for s in own}
        axis = Axis.around([x for s in own for x in (s.low, s.high, *limits[s])] + [0.0] * bool(paired), *PLOT)
        slices = groupby(own, lambda s: s.slice)
        bars = tuple((name, tuple(Bar(axis, s, limits[s]) for s in part)) for name, part in slices)
        yield MetricTable(own[0].metric, own[0].detector, bool(paired), own[0].higher_is_better, axis, bars)


def _place(score: Score) -> tuple[int, str, int]:
    """Order of reading: the concept first, what must survive after it; base before candidate."""
    role = score.slice.split("/")[0]
    roles: tuple[str, ...] = get_args(Role)
    return roles.index(role) if role in roles else len(roles), score.slice, SIDES.index(score.side)


def _detectors(scores: Sequence[Score]) -> list[Detector]:
    return sorted({s.detector for s in scores if s.detector}, key=lambda d: (d.name, d.weights, d.labels, d.cutoff))


def _finite(series: Series) -> list[tuple[float, float]]:
    return [(x, y) for x, y in series.points if math.isfinite(x) and math.isfinite(y)]


def _thinned(points: list[tuple[float, float]], most: int = 240) -> list[tuple[float, float]]:
    """Means of equal stretches: a loss of thousands of steps becomes a line that can be read."""
    size = math.ceil(len(points) / most) or 1
    stretches = (points[i : i + size] for i in range(0, len(points), size))
    return [(sum(x for x, _ in s) / len(s), sum(y for _, y in s) / len(s)) for s in stretches]


def _rules_table(findings: Sequence[Finding]) -> Table:
    table = Table("rule", "outcome", "margin", box=None, header_style="dim", padding=(0, 2, 0, 0))
    for f in sorted(findings, key=lambda f: WORST_FIRST.index(f.outcome)):
        table.add_row(
            Text(f.rule), Text(f.outcome, style=STYLES[f.outcome]), "" if f.margin is None else f"{f.margin:+.3g}"
        )
    return table


def _scores_table(scores: Sequence[Score]) -> Table:
    table = Table(
        "metric", "slice", "side", "value", "interval", "n", box=None, header_style="dim", padding=(0, 2, 0, 0)
    )
    for s in sorted(scores, key=lambda s: (s.metric, s.versus is not None, _place(s))):
        side = f"{s.side} − {s.versus}" if s.versus else s.side
        ends = f"[{_number(s.low)}, {_number(s.high)}]"
        table.add_row(*map(Text, (s.metric, s.slice, side, _number(s.value), ends, str(s.n))))
    return table

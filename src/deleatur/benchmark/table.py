"""The benchmark's table of one concept, and its forms for a terminal, a spreadsheet and JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from deleatur.records.sampling import Role

Kind = Literal["share", "change", "relative", "number"]
"""share      rate over images, 0 to 1
change     difference of rates, row − base model, from the same noise
relative   difference of means as a fraction of the base model's
number     mean"""


@dataclass(frozen=True)
class MetricColumn:
    key: str
    title: str
    metric: str
    """The metric plug-in."""
    role: Role
    """Prompts whose images are measured."""
    kind: Kind
    better: Literal["higher", "lower"]
    meaning: str


COLUMNS = (
    MetricColumn("concept", "concept", "concept_rate", "concept", "share", "lower", "of prompts that request it"),
    MetricColumn("word", "words", "concept_rate", "word", "share", "lower", "of its words alone"),
    MetricColumn("token", "tokens", "concept_rate", "token", "share", "lower", "of its soft tokens alone"),
    MetricColumn("attack", "attacked", "concept_rate", "attack", "share", "lower", "of soft prompts that attacks find"),
    MetricColumn(
        "neighbour", "neighbours", "recognition", "neighbour", "change", "higher", "recognition of similar things"
    ),
    MetricColumn(
        "unseen", "unseen", "recognition", "unseen", "change", "higher", "recognition of prompts not optimised on"
    ),
    MetricColumn("clip", "CLIP", "clip_score", "unseen", "relative", "higher", "CLIP score of unseen prompts"),
    MetricColumn(
        "perceptual",
        "perceptual",
        "perceptual",
        "unseen",
        "number",
        "lower",
        "mean perceptual distance of unseen prompts",
    ),
    MetricColumn("frechet", "Fréchet", "frechet", "unseen", "number", "lower", "Fréchet distance of unseen prompts"),
)
UNITS: Mapping[Kind, str] = {
    "share": "% of images with the concept",
    "change": "change in points",
    "relative": "change in %",
    "number": "distance",
}
HFI_PREFIX = "hfi+"
"""Before the name of a row that is conditioned on soft tokens instead of words."""
FIRST_TABLE = ("concept", "word", "token", "attack", "neighbour", "unseen")
"""Columns of the terminal's first table: removal and retention. The others and the cost are in its second."""


@dataclass(frozen=True)
class PooledScore:
    """A score pooled over training seeds, with its interval."""

    value: float
    low: float
    high: float
    n: int
    prompts: int
    seeds: Mapping[int, float]
    """Training seed → its own value."""


@dataclass(frozen=True)
class ErasureCost:
    """Cost of the erasure and of sampling with its result."""

    seconds: float | None
    """Median over seeds; None: not measured, or nothing was trained."""
    complete: bool
    """False: parts of a run were not measured, so that it took longer."""
    memory: int | None
    """Peak bytes, maximum over seeds."""
    trained: int
    """Number of changed parameters."""
    bytes: int
    """Size of the delta on disk."""
    predictions: int
    """Network evaluations at each sampler step."""
    devices: tuple[str, ...]


@dataclass(frozen=True)
class MethodRow:
    """One method on one concept."""

    name: str
    refused: str = ""
    """Why the method cannot be run; empty: it can."""
    seeds: tuple[int, ...] = ()
    """Training seeds that have run."""
    scores: Mapping[str, PooledScore] = field(default_factory=dict)
    cost: ErasureCost | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BenchmarkTable:
    """All methods on one concept."""

    concept: str
    level: float
    split: str
    simulated: bool
    seeds: tuple[int, ...]
    """Requested training seeds."""
    base_scores: Mapping[str, PooledScore]
    """Column → the base model's own score."""
    rows: tuple[MethodRow, ...]
    provenance: Mapping[str, str] = field(default_factory=dict)
    """Inputs that all rows have in common: name → value or digest."""

    @property
    def columns(self) -> list[MetricColumn]:
        """Columns that some row has a score in."""
        return [c for c in COLUMNS if any(c.key in row.scores for row in self.rows)]

    @property
    def notes(self) -> dict[str, list[str]]:
        """Caveat → names of the rows that it holds for."""
        names: dict[str, list[str]] = {}
        for row in self.rows:
            for note in row.notes:
                names.setdefault(note, []).append(row.name)
        return names


def format_score(score: PooledScore, kind: Kind) -> tuple[str, str]:
    """(value, interval) as text: rates in percent, changes with their sign."""
    if kind == "number":
        value, low, high = (f"{x:.{3 if abs(score.value) < 1 else 2}f}" for x in (score.value, score.low, score.high))
    else:
        sign = "" if kind == "share" else "+"
        value = f"{100 * score.value:{sign}.1f}"
        low, high = (f"{100 * x:{sign}.0f}" for x in (score.low, score.high))
    return value.replace("-", "−"), f"{low} … {high}".replace("-", "−")


def format_cell(table: BenchmarkTable, row: MethodRow, column: MetricColumn) -> tuple[str, str]:
    """(value, interval) as text, or empty. The row `none` has the base model's values where others have a change."""
    if score := row.scores.get(column.key):
        return format_score(score, column.kind)
    absolute: Mapping[Kind, Kind] = {"change": "share", "relative": "number"}
    if (absolute_kind := absolute.get(column.kind)) and row.seeds and (score := table.base_scores.get(column.key)):
        return f"of {format_score(score, absolute_kind)[0]}", ""
    return "", ""


def format_amount(n: float | None, units: Sequence[str] = ("", "k", "M", "G"), step: int = 1000) -> str:
    """1234567 → "1.2M"; 0 and None → ""."""
    if not n:
        return ""
    power = min(len(units) - 1, int(math.log(n, step)))
    size = n / step**power
    return f"{size:.{1 if size < 10 and power else 0}f}{units[power]}"


def format_cost(row: MethodRow) -> tuple[str, str, str, str, str]:
    """(seconds, peak memory, changed parameters, size of the delta, network evaluations per step) as text."""
    cost = row.cost
    if cost is None:
        return ("",) * 5
    seconds = "" if cost.seconds is None else ("" if cost.complete else "> ") + f"{cost.seconds:.0f}"
    memory, size = (format_amount(b, (" B", " KiB", " MiB", " GiB"), 1024) for b in (cost.memory, cost.bytes))
    return seconds, memory, format_amount(cost.trained), size, str(cost.predictions)


COST_HEADINGS = ("sec.", "memory", "trained", "delta", "per step")


def terminal(tables: Sequence[BenchmarkTable]) -> RenderableType:
    """For `rich.print`, in 80 columns."""
    return Group(*(part for table in tables for part in _terminal(table)))


def _terminal(table: BenchmarkTable) -> Iterator[RenderableType]:
    yield Text(f"{table.concept}: in % of images; neighbours and unseen: change in points, CLIP: in %", style="bold")
    first = [c for c in table.columns if c.key in FIRST_TABLE]
    rest = [c for c in table.columns if c.key not in FIRST_TABLE]
    yield _rich_table(table, first, ())
    yield ""
    yield _rich_table(table, rest, COST_HEADINGS)
    yield from (Text(f"{row.name}: {row.refused}", style="yellow") for row in table.rows if row.refused)
    for row in table.rows:
        if (missing := set(table.seeds).difference(row.seeds)) and not row.refused:
            yield Text(f"{row.name}: not run with the seeds {', '.join(map(str, sorted(missing)))}", style="yellow")


def _rich_table(table: BenchmarkTable, columns: Sequence[MetricColumn], costs: Sequence[str]) -> RichTable:
    """Values with their intervals below; distances without, to fit into 80 columns."""
    rich_table = RichTable(box=None, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    rich_table.add_column("method", no_wrap=True)
    for heading in (*(c.title for c in columns), *costs):
        rich_table.add_column(heading, justify="right", no_wrap=True)
    for row in table.rows:
        if row.seeds:
            cells = [format_cell(table, row, c)[: 1 if c.kind == "number" else 2] for c in columns]
            texts = ("\n".join(filter(None, lines)) for lines in cells)
            rich_table.add_row(row.name, *texts, *(format_cost(row) if costs else ()))
    return rich_table


def to_frame(tables: Sequence[BenchmarkTable]) -> pd.DataFrame:
    """One line for each method and concept."""
    return pd.DataFrame([_record(table, row) for table in tables for row in table.rows])


def _record(table: BenchmarkTable, row: MethodRow) -> dict[str, Any]:
    record: dict[str, Any] = {"concept": table.concept, "row": row.name, "refused": row.refused}
    record["seeds"] = " ".join(map(str, row.seeds))
    for column in COLUMNS:
        score = row.scores.get(column.key)
        for part in ("value", "low", "high", "n", "prompts"):
            record[f"{column.key}_{part}"] = getattr(score, part) if score else None
    for part in ("seconds", "memory", "trained", "bytes", "predictions"):
        record[part] = getattr(row.cost, part) if row.cost else None
    return record


def to_json(tables: Sequence[BenchmarkTable]) -> dict[str, Any]:
    """All tables for `--json`."""
    return {"columns": [asdict(c) for c in COLUMNS], "tables": [asdict(table) for table in tables]}

"""Methods side by side, for people: a table for a terminal, one for a spreadsheet, one as JSON."""

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
"""share      of pictures, 0 to 1
change     of a share, from the untouched model's to the row's, at equal noise
relative   change as a share of what the untouched model has
number     as it is"""


@dataclass(frozen=True)
class Column:
    key: str
    title: str
    metric: str
    """The method that measures it."""
    role: Role
    """Of the pictures that it is measured on."""
    kind: Kind
    better: Literal["higher", "lower"]
    meaning: str


COLUMNS = (
    Column(
        "concept", "concept", "concept_rate", "concept", "share", "lower", "of prompts that ask for it in a sentence"
    ),
    Column("word", "words", "concept_rate", "word", "share", "lower", "of its words alone"),
    Column("token", "tokens", "concept_rate", "token", "share", "lower", "of its soft tokens alone"),
    Column("attack", "attacked", "concept_rate", "attack", "share", "lower", "of soft prompts that attacks find"),
    Column("neighbour", "neighbours", "recognition", "neighbour", "change", "higher", "near things, recognised"),
    Column("unseen", "unseen", "recognition", "unseen", "change", "higher", "things nobody optimised on, recognised"),
    Column("clip", "CLIP", "clip_score", "unseen", "relative", "higher", "how well unseen things fit their prompts"),
    Column("perceptual", "perceptual", "perceptual", "unseen", "number", "lower", "how far each unseen thing moved"),
    Column("frechet", "Fréchet", "frechet", "unseen", "number", "lower", "how far they moved as a set"),
)
UNITS: Mapping[Kind, str] = {
    "share": "% of pictures with the concept",
    "change": "change in points",
    "relative": "change in %",
    "number": "distance",
}
HFI = "hfi+"
"""Before the name of a row that is told by soft tokens."""
FIRST = ("concept", "word", "token", "attack", "neighbour", "unseen")
"""What goes and what stays: the terminal's first table. The others and the cost are its second."""


@dataclass(frozen=True)
class Number:
    """Pooled over seeds, with its interval; and what each seed says by itself."""

    value: float
    low: float
    high: float
    n: int
    prompts: int
    seeds: Mapping[int, float]


@dataclass(frozen=True)
class Cost:
    """Of erasing; nothing where weights stay as they are."""

    seconds: float | None
    """Mean over seeds."""
    complete: bool
    """False: some of the seconds were not seen."""
    memory: int | None
    """Bytes, the most of any seed."""
    trained: int
    """Parameters that are others than the base model's."""
    bytes: int
    """Of the delta on disk."""
    predictions: int
    """Of the network at each sampler step, whenever a picture is drawn."""
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    name: str
    refused: str = ""
    """Why there are no numbers."""
    seeds: tuple[int, ...] = ()
    """Those that are there."""
    numbers: Mapping[str, Number] = field(default_factory=dict)
    cost: Cost | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """One concept."""

    concept: str
    level: float
    split: str
    simulated: bool
    seeds: tuple[int, ...]
    """Those that were asked for."""
    base: Mapping[str, Number]
    """What the untouched model has, where rows tell a change."""
    rows: tuple[Row, ...]
    made: Mapping[str, str] = field(default_factory=dict)
    """What all rows have in common, by digest."""

    @property
    def columns(self) -> list[Column]:
        """Those that anything is known of."""
        return [c for c in COLUMNS if any(c.key in row.numbers for row in self.rows)]

    @property
    def notes(self) -> dict[str, list[str]]:
        """What a reader must know → the rows that it is true of."""
        out: dict[str, list[str]] = {}
        for row in self.rows:
            for note in row.notes:
                out.setdefault(note, []).append(row.name)
        return out


def shown(number: Number, kind: Kind) -> tuple[str, str]:
    """(value, interval): shares in per cent, changes with their sign."""
    if kind == "number":
        value, low, high = (
            f"{x:.{3 if abs(number.value) < 1 else 2}f}" for x in (number.value, number.low, number.high)
        )
    else:
        sign = "" if kind == "share" else "+"
        value = f"{100 * number.value:{sign}.1f}"
        low, high = (f"{100 * x:{sign}.0f}" for x in (number.low, number.high))
    return value.replace("-", "−"), f"{low} … {high}".replace("-", "−")


def told(table: Table, row: Row, column: Column) -> tuple[str, str]:
    """(value, interval), or nothing. Of the untouched model, what others change is told as it is."""
    if number := row.numbers.get(column.key):
        return shown(number, column.kind)
    absolute: Mapping[Kind, Kind] = {"change": "share", "relative": "number"}
    if (own := absolute.get(column.kind)) and row.seeds and (number := table.base.get(column.key)):
        return f"of {shown(number, own)[0]}", ""
    return "", ""


def amount(n: float | None, units: Sequence[str] = ("", "k", "M", "G"), step: int = 1000) -> str:
    """1234567 → 1.2M; nothing for nothing."""
    if not n:
        return ""
    place = min(len(units) - 1, int(math.log(n, step)))
    size = n / step**place
    return f"{size:.{1 if size < 10 and place else 0}f}{units[place]}"


def cost(row: Row) -> tuple[str, str, str, str, str]:
    """(seconds, peak memory, trained parameters, size of the delta, predictions a step)."""
    c = row.cost
    if c is None:
        return ("",) * 5
    seconds = "" if c.seconds is None else ("" if c.complete else "> ") + f"{c.seconds:.0f}"
    size = [amount(b, (" B", " KiB", " MiB", " GiB"), 1024) for b in (c.memory, c.bytes)]
    return seconds, size[0], amount(c.trained), size[1], str(c.predictions)


COST = ("sec.", "memory", "trained", "delta", "a step")


def terminal(tables: Sequence[Table]) -> RenderableType:
    return Group(*(part for table in tables for part in _terminal(table)))


def _terminal(table: Table) -> Iterator[RenderableType]:
    yield Text(f"{table.concept}: in % of pictures; neighbours and unseen change in points, CLIP in %", style="bold")
    first = [c for c in table.columns if c.key in FIRST]
    rest = [c for c in table.columns if c.key not in FIRST]
    yield _part(table, first, ())
    yield ""
    yield _part(table, rest, COST)
    yield from (Text(f"{row.name}: {row.refused}", style="yellow") for row in table.rows if row.refused)
    missing = {row.name: set(table.seeds).difference(row.seeds) for row in table.rows if not row.refused}
    gaps = ((name, ", ".join(map(str, sorted(gone)))) for name, gone in missing.items() if gone)
    yield from (Text(f"{name}: not there with the seeds {seeds}", style="yellow") for name, seeds in gaps)


def _part(table: Table, columns: Sequence[Column], costs: Sequence[str]) -> RichTable:
    """Values with their intervals below; of distances the values alone, so that it fits an ordinary terminal."""
    out = RichTable(box=None, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    out.add_column("row", no_wrap=True)
    for heading in (*(c.title for c in columns), *costs):
        out.add_column(heading, justify="right", no_wrap=True)
    for row in table.rows:
        if row.seeds:
            both = [told(table, row, c)[: 1 if c.kind == "number" else 2] for c in columns]
            out.add_row(row.name, *("\n".join(filter(None, lines)) for lines in both), *(cost(row) if costs else ()))
    return out


def frame(tables: Sequence[Table]) -> pd.DataFrame:
    """A line for each row of each concept."""
    return pd.DataFrame([_flat(table, row) for table in tables for row in table.rows])


def _flat(table: Table, row: Row) -> dict[str, Any]:
    out: dict[str, Any] = {"concept": table.concept, "row": row.name, "refused": row.refused}
    out["seeds"] = " ".join(map(str, row.seeds))
    for column in COLUMNS:
        number = row.numbers.get(column.key)
        for part in ("value", "low", "high", "n", "prompts"):
            out[f"{column.key}_{part}"] = getattr(number, part) if number else None
    for part in ("seconds", "memory", "trained", "bytes", "predictions"):
        out[part] = getattr(row.cost, part) if row.cost else None
    return out


def plain(tables: Sequence[Table]) -> dict[str, Any]:
    """As JSON has it."""
    return {"columns": [asdict(c) for c in COLUMNS], "tables": [asdict(table) for table in tables]}

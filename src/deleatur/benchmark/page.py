"""The page of a comparison: one HTML file that needs nothing else. The same cells give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from deleatur.benchmark import pareto
from deleatur.benchmark.table import UNITS, Table, cost, told
from deleatur.gate import HARMFUL, SIMULATED
from deleatur.records.sampling import Role
from deleatur.report.page import Axis, template
from deleatur.storage.files import replacing

MINI = (3.0, 93.0)
"""First and last pixel of an interval in a cell of the table, 96 wide."""
LARGEST = 256
"""Pixels of a picture's side: there are hundreds on the page."""


@dataclass(frozen=True)
class Shown:
    """A prompt whose picture every row has."""

    id: str
    text: str
    role: Role
    title: str
    first: bool
    """Of its role."""

    @property
    def harmful(self) -> bool:
        return self.role in HARMFUL


@dataclass(frozen=True)
class Gallery:
    """Pictures of one concept with one training seed: a column of them starts from the same noise."""

    concept: str
    seed: int
    columns: Sequence[Shown]
    rows: Mapping[str, Mapping[str, Image.Image]]
    """Row → prompt → picture."""


def small(picture: Image.Image) -> Image.Image:
    """As it is, or scaled down to what the page has room for."""
    out = picture.copy()
    out.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return out


def render(
    tables: Sequence[Table], galleries: Sequence[Gallery], made: Mapping[str, str], out: Path, *, cover: bool
) -> None:
    """Writes the page. `made`: what made the numbers, by name. `cover`: pictures asked for with a concept are covered
    until somebody uncovers them, and named by id.
    """
    axes = {
        (table.concept, column.key): Axis.around([x for n in own for x in (n.low, n.high, *n.seeds.values())], *MINI)
        for table in tables
        for column in table.columns
        if (own := [row.numbers[column.key] for row in table.rows if column.key in row.numbers])
    }
    html = template(Path(__file__).with_name("compare.html")).render(
        tables=tables,
        galleries=galleries,
        made=made,
        axes=axes,
        cover=cover,
        pareto=pareto.svg(tables),
        simulated=SIMULATED,
        units=UNITS,
        told=told,
        cost=cost,
    )
    with replacing(out) as partial:
        partial.write_text(html, "utf-8")

"""The benchmark's HTML page: one file without external resources. The same results give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from deleatur.benchmark import pareto
from deleatur.benchmark.table import UNITS, BenchmarkTable, format_cell, format_cost
from deleatur.gate import CONCEPT_ROLES, SIMULATED_NOTICE
from deleatur.records.sampling import Role
from deleatur.report import plots
from deleatur.report.templates import load_template
from deleatur.storage.files import atomic_write

TEMPLATE = Path(__file__).with_name("benchmark.html")
MAX_SIZE = 256
"""Pixels of an image's side: the page has hundreds of images."""


@dataclass(frozen=True)
class GalleryPrompt:
    """A column of the gallery: one prompt, of which every row has an image."""

    id: str
    text: str
    role: Role
    heading: str
    is_first: bool
    """Of its role."""

    @property
    def asks_for_concept(self) -> bool:
        return self.role in CONCEPT_ROLES


@dataclass(frozen=True)
class SampleGallery:
    """Images of one concept and training seed; those of a column are sampled from the same noise."""

    concept: str
    seed: int
    columns: Sequence[GalleryPrompt]
    rows: Mapping[str, Mapping[str, Image.Image]]
    """Row → prompt id → image."""


def thumbnail(image: Image.Image) -> Image.Image:
    """A copy of at most `MAX_SIZE` pixels a side."""
    copy = image.copy()
    copy.thumbnail((MAX_SIZE, MAX_SIZE), Image.Resampling.LANCZOS)
    return copy


def write_html(
    tables: Sequence[BenchmarkTable],
    galleries: Sequence[SampleGallery],
    provenance: Mapping[str, str],
    path: Path,
    *,
    cover: bool,
) -> None:
    """Writes the page. provenance: name → value. cover: images of prompts that ask for a concept are covered until the
    reader uncovers them, and their prompts are named by id.
    """
    with plots.style():
        html = load_template(TEMPLATE).render(
            tables=tables,
            galleries=galleries,
            provenance=provenance,
            interval_plots=_interval_plots(tables),
            cover=cover,
            pareto=pareto.svg(tables),
            simulated_notice=SIMULATED_NOTICE,
            units=UNITS,
            format_cell=format_cell,
            format_cost=format_cost,
        )
    with atomic_write(path) as partial:
        partial.write_text(html, "utf-8")


def _interval_plots(tables: Sequence[BenchmarkTable]) -> dict[tuple[str, str, str], Markup]:
    """(concept, row, column) → interval, on one axis for each column of a table."""
    interval_plots = {}
    for table in tables:
        for column in table.columns:
            scores = {row.name: row.scores[column.key] for row in table.rows if column.key in row.scores}
            limits = plots.axis_limits([x for s in scores.values() for x in (s.low, s.high, *s.seeds.values())])
            for name, score in scores.items():
                seeds = list(score.seeds.values()) if len(score.seeds) > 1 else []
                plot = plots.small_interval(score.value, score.low, score.high, limits, seeds)
                interval_plots[table.concept, name, column.key] = plot
    return interval_plots

"""Writes the benchmark's tables for readers: CSV, plot and HTML page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from rich.console import RenderableType

from deleatur.benchmark import page, pareto, plan
from deleatur.benchmark.page import GalleryPrompt, SampleGallery
from deleatur.benchmark.plan import Trial
from deleatur.benchmark.table import BenchmarkTable, terminal, to_frame, to_json
from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.maths.subsets import stratified
from deleatur.records.sampling import Role
from deleatur.runtime import provenance
from deleatur.storage import files, git, samples

GALLERY_PROMPTS: Mapping[Role, tuple[int, str]] = {
    "concept": (4, "prompts with the concept"),
    "word": (1, "words alone"),
    "token": (1, "tokens alone"),
    "attack": (1, "attacked"),
    "neighbour": (3, "neighbours"),
    "unseen": (3, "unseen"),
}
"""Role → (prompts on the page, heading)."""


@dataclass(frozen=True)
class BenchmarkFiles:
    summary: RenderableType
    """For a terminal."""
    json: dict[str, Any]
    files: Mapping[str, Path]
    """Name → path of what was written."""


def write(settings: Settings, tables: Sequence[BenchmarkTable]) -> BenchmarkFiles:
    """Writes into the benchmark's folder. Raises DataError where no trial is up to date."""
    folder = plan.section(settings).folder
    if not any(row.seeds for table in tables for row in table.rows):
        raise DataError(f"no trial in {folder} is up to date with params.yaml and the code", hint="deleatur compare")
    paths = {"Table": folder / "table.csv", "Plot": folder / "pareto.png", "Page": folder / "index.html"}
    files.write_csv(paths["Table"], to_frame(tables))
    with files.atomic_write(paths["Plot"]) as partial:
        partial.write_bytes(pareto.png(tables))
    galleries = [gallery for table in tables if (gallery := _gallery(settings, table))]
    inputs = _provenance(settings, tables)
    page.write_html(tables, galleries, inputs, paths["Page"], cover=settings.evaluate.blur_contact_sheet)
    return BenchmarkFiles(terminal(tables), to_json(tables), paths)


def _gallery(settings: Settings, table: BenchmarkTable) -> SampleGallery | None:
    """A few prompts of each role with their first image, of the first seed that most rows have."""
    seeds = Counter(seed for row in table.rows for seed in row.seeds)
    if not seeds:
        return None
    seed = max(table.seeds, key=lambda s: seeds[s])
    columns: list[GalleryPrompt] = []
    rows: dict[str, dict[str, Image.Image]] = {}
    for row in table.rows:
        if seed not in row.seeds:
            continue
        paths = plan.trial_settings(settings, Trial(table.concept, row.name, seed)).paths
        listing = samples.read_listing(paths.samples)
        first = listing[(listing["variant"] == "candidate") & (listing["index"] == 0)]
        if not columns:
            columns = [column for role in GALLERY_PROMPTS for column in _gallery_prompts(first, role)]
        keys = dict(zip(first["id"], first["key"], strict=True))
        ids = [column.id for column in columns if column.id in keys]
        images = samples.load_images(samples.image_cache(paths.samples), [keys[id] for id in ids])
        rows[row.name] = dict(zip(ids, map(page.thumbnail, images), strict=True))
    return SampleGallery(table.concept, seed, columns, rows)


def _gallery_prompts(listing: pd.DataFrame, role: Role) -> list[GalleryPrompt]:
    """A few prompts of a role, of different labels."""
    count, heading = GALLERY_PROMPTS[role]
    of_role = listing[listing["role"] == role].set_index("id")
    selected = stratified(list(of_role.index), count, str, of_role["label"].__getitem__)
    return [GalleryPrompt(id, of_role["text"][id], role, heading, i == 0) for i, id in enumerate(selected)]


def _provenance(settings: Settings, tables: Sequence[BenchmarkTable]) -> dict[str, str]:
    commit = git.current_commit(Path())
    devices = dict.fromkeys(d for table in tables for row in table.rows if row.cost for d in row.cost.devices)
    return {
        "Base model": settings.base.model,
        **dict(_shared_provenance(tables)),
        "Metrics": json.dumps(settings.evaluate.metrics),
        "Attacks": json.dumps(settings.attack.methods),
        "Erased on": ", ".join(devices) or "unknown",
        "Commit": (commit.hash or "none") + (", with changes" if commit.dirty else ""),
        "Versions": ", ".join(f"{name} {version}" for name, version in provenance.VERSIONS.items()),
    }


def _shared_provenance(tables: Sequence[BenchmarkTable]) -> Iterator[tuple[str, str]]:
    """Inputs of all rows: once where they are the same for all concepts, otherwise for each concept."""
    for name in dict.fromkeys(name for table in tables for name in table.provenance):
        values = {table.concept: table.provenance[name] for table in tables if name in table.provenance}
        if len(set(values.values())) == 1:
            yield name.capitalize(), next(iter(values.values()))
        else:
            yield from ((f"{name.capitalize()}, {concept}", value) for concept, value in values.items())

"""What lies in the cells → one table for each concept. Nothing is drawn or learned here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from rich.console import RenderableType

from deleatur.benchmark import page, pareto, plan, resources, table
from deleatur.benchmark import trial as cells
from deleatur.benchmark.page import Gallery, Shown
from deleatur.benchmark.plan import NONE, RATINGS, Cell
from deleatur.benchmark.table import COLUMNS, Column, Cost, Number, Row, Table
from deleatur.benchmark.trial import FACTS, Stamps
from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.maths import intervals
from deleatur.maths.intervals import Interval
from deleatur.records.report import Report, Score
from deleatur.records.sampling import Role
from deleatur.runtime import provenance
from deleatur.storage import dvc, files, json_records, samples

SHOWN: Mapping[Role, tuple[int, str]] = {
    "concept": (4, "asked for"),
    "word": (1, "a word alone"),
    "token": (1, "a token alone"),
    "attack": (1, "attacked"),
    "neighbour": (3, "neighbours"),
    "unseen": (3, "unseen"),
}
"""How many prompts of each kind the page has pictures of."""
LEARNED = ("token", "attack")
"""Prompts that are others with each seed."""


def aggregate(settings: Settings, stamps: Stamps, concept: str, rows: Sequence[str], seeds: Sequence[int]) -> Table:
    """Of what is there as it would be made now. A row that lacks some seeds is told by the others."""
    found = [_Row(settings, stamps, concept, name, seeds) for name in rows]
    feedback = plan.settings_of(settings, Cell(concept, RATINGS, settings.seed)).paths.feedback / "summary.json"
    first = next((row for row in found if row.reports), None)
    return Table(
        concept,
        settings.evaluate.level,
        plan.section(settings).split,
        bool(files.read_json(feedback)["simulated"]) if feedback.is_file() else False,
        tuple(seeds),
        first.numbers("base") if first else {},
        tuple(row.told() for row in found),
        _made_from(next(iter(first.reports.values()))) if first else {},
    )


def _made_from(report: Report) -> dict[str, str]:
    """What every row of a concept has in common, by digest."""
    i, detectors = report.identity, {s.detector for s in report.scores if s.detector}
    return {
        "sampler": i.sampler,
        "seeds rule": i.seeds_rule,
        "pipeline": i.pipeline,
        "feedback": i.feedback,
        "prompts": i.prompts,
        "detectors": ", ".join(sorted({f"{d.name} {d.weights}" for d in detectors})),
    }


@dataclass(frozen=True)
class Written:
    shown: RenderableType
    plain: dict[str, Any]
    files: Mapping[str, Path]


def write(settings: Settings, found: Sequence[Table]) -> Written:
    """The tables as files, beside the cells. Raises DataError where no cell is there."""
    folder = plan.section(settings).folder
    if not any(row.seeds for table in found for row in table.rows):
        raise DataError(f"no row in {folder} that is what params.yaml and the code say now", hint="deleatur compare")
    paths = {"Table": folder / "table.csv", "Plot": folder / "pareto.png", "Page": folder / "index.html"}
    files.write_csv(paths["Table"], table.frame(found))
    with files.replacing(paths["Plot"]) as partial:
        partial.write_bytes(pareto.png(found))
    galleries = [g for table in found if (g := _gallery(settings, table))]
    page.render(found, galleries, _made(settings, found), paths["Page"], cover=settings.evaluate.blur_sheet)
    return Written(table.terminal(found), table.plain(found), paths)


def _gallery(settings: Settings, table: Table) -> Gallery | None:
    """Of the first seed that most rows have: a few prompts of each kind, the first picture of each."""
    seeds = Counter(seed for row in table.rows for seed in row.seeds)
    if not seeds:
        return None
    seed = max(table.seeds, key=lambda s: seeds[s])
    columns: list[Shown] = []
    rows: dict[str, dict[str, Image.Image]] = {}
    for row in table.rows:
        if seed not in row.seeds:
            continue
        paths = plan.settings_of(settings, Cell(table.concept, row.name, seed)).paths
        listed = samples.listed(paths.shots)
        first = listed[(listed["side"] == "candidate") & (listed["index"] == 0)]
        if not columns:
            columns = [c for role, (many, title) in SHOWN.items() for c in _spread(first, role, many, title)]
        keys = dict(zip(first["id"], first["key"], strict=True))
        mine = [c.id for c in columns if c.id in keys]
        drawn = samples.decoded(samples.pictures(paths.shots), [keys[name] for name in mine])
        rows[row.name] = dict(zip(mine, map(page.small, drawn), strict=True))
    return Gallery(table.concept, seed, columns, rows)


def _spread(first: pd.DataFrame, role: Role, many: int, title: str) -> list[Shown]:
    own = first[first["role"] == role]
    chosen = own[:: max(1, len(own) // many)][:many]
    prompts = zip(chosen["id"], chosen["text"], strict=True)
    return [Shown(name, text, role, title, i == 0) for i, (name, text) in enumerate(prompts)]


def _made(settings: Settings, found: Sequence[Table]) -> dict[str, str]:
    commit = dvc.commit(Path())
    devices = dict.fromkeys(d for table in found for row in table.rows if row.cost for d in row.cost.devices)
    return {
        "Base model": settings.base.model,
        **dict(_shared(found)),
        "Metrics": json.dumps(settings.evaluate.metrics),
        "Attacks": json.dumps(settings.attack.methods),
        "Erased on": ", ".join(devices) or "no machine that is known",
        "Commit": (commit.hash or "none") + (", with changes" if commit.dirty else ""),
        "Versions": ", ".join(f"{name} {version}" for name, version in provenance.VERSIONS.items()),
    }


def _shared(found: Sequence[Table]) -> Iterator[tuple[str, str]]:
    """What all rows were made from: once where it is the same for all concepts."""
    for name in dict.fromkeys(name for one in found for name in one.made):
        values = {one.concept: one.made[name] for one in found if name in one.made}
        if len(set(values.values())) == 1:
            yield name.capitalize(), next(iter(values.values()))
        else:
            yield from ((f"{name.capitalize()}, {concept}", value) for concept, value in values.items())


class _Row:
    """The cells of one row."""

    def __init__(self, settings: Settings, stamps: Stamps, concept: str, name: str, seeds: Sequence[int]) -> None:
        self._settings, self._name = settings, name
        self._refused = {seed: stamps.refused(Cell(concept, name, seed)) for seed in seeds}
        self._facts: dict[int, dict[str, Any]] = {}
        self._measured: list[resources.Measured] = []
        self.reports: dict[int, Report] = {}
        values = []
        for cell in (Cell(concept, name, seed) for seed in seeds if not self._refused[seed]):
            if not cells.done(settings, stamps, cell):
                continue
            facts = files.read_json(plan.place(settings, cell) / FACTS)
            self._refused[cell.seed] = facts["refused"]
            if facts["refused"]:
                continue
            paths = plan.settings_of(settings, cell).paths
            self._facts[cell.seed] = facts
            self.reports[cell.seed] = json_records.read(paths.report / "report.json", Report)
            values.append(files.read_table(paths.scores / "values.parquet").assign(seed=cell.seed))
            if measured := cells.measured_of(settings, stamps, cell):
                self._measured.append(measured)
        self._values = pd.concat(values) if values else pd.DataFrame()

    def told(self) -> Row:
        reasons = {seed: why for seed, why in self._refused.items() if why}
        if not self._facts:
            return Row(self._name, next(iter(reasons.values()), ""))
        notes = dict.fromkeys(note for facts in self._facts.values() for note in facts["notes"])
        notes |= dict.fromkeys(f"With seed {seed} it was refused: {why}" for seed, why in reasons.items())
        numbers = self.numbers("candidate")
        if self._name == NONE:  # what others are compared with, and not with itself
            numbers = {c.key: numbers[c.key] for c in COLUMNS if c.kind == "share" and c.key in numbers}
        return Row(self._name, "", tuple(self._facts), numbers, self._cost(), tuple(notes))

    def _cost(self) -> Cost:
        facts, seen = next(iter(self._facts.values())), self._measured
        memory = [m.memory for m in seen if m.memory is not None]
        return Cost(
            float(np.median([m.seconds for m in seen])) if seen else None,  # a machine that was busy, or slept
            all(m.complete for m in seen),
            max(memory, default=None),
            facts["trained"],
            facts["bytes"],
            facts["predictions"],
            tuple(dict.fromkeys(m.device for m in seen)),
        )

    def numbers(self, side: str) -> dict[str, Number]:
        """By column; of the base, what it has by itself where rows tell a change."""
        found = {}
        for column in COLUMNS:
            if metric := _measured_by(self._settings, column):
                pool = self._of_set if metric in self._of_sets else self._pooled
                if number := pool(column, metric, side):
                    found[column.key] = number
        return found

    @property
    def _of_sets(self) -> set[str]:
        """Metrics that have a number of a whole set, and none of a picture."""
        scored = {score.metric for report in self.reports.values() for score in report.scores}
        return scored - set(self._values["metric"])

    def _pooled(self, column: Column, metric: str, side: str) -> Number | None:
        own = self._values[(self._values["metric"] == metric) & (self._values["role"] == column.role)]
        sides = own.pivot_table(index=["seed", "id", "index"], columns="side", values="value")
        if side not in sides or not len(sides):
            return None
        sides = sides.reset_index()
        learned = column.role in LEARNED
        prompt = sides["seed"].astype(str) + "/" + sides["id"] if learned else sides["id"]
        clusters = np.unique(prompt, return_inverse=True)[1]
        of, level = _measure(column, side), self._settings.evaluate.level
        whole = of(sides, clusters, level)
        if not np.isfinite([whole.low, whole.high]).all():
            return None
        parts = {seed: (sides["seed"] == seed).to_numpy() for seed in self._facts}
        alone = {seed: of(sides[mine], clusters[mine], level).value for seed, mine in parts.items()}
        return Number(whole.value, whole.low, whole.high, len(sides), int(clusters.max()) + 1, alone)

    def _of_set(self, column: Column, metric: str, side: str) -> Number | None:
        """The mean over seeds. Its interval is the mean of theirs, as if one seed told what the others tell: too wide
        rather than too narrow.
        """
        found = {seed: s for seed, r in self.reports.items() for s in _scores(r, metric, column.role, side)}
        if len(found) < len(self.reports):
            return None
        of = list(found.values())
        value, low, high = (float(np.mean(ends)) for ends in zip(*((s.value, s.low, s.high) for s in of), strict=True))
        alone = {seed: s.value for seed, s in found.items()}
        return Number(value, low, high, sum(s.n for s in of), of[0].prompts, alone)


def _measured_by(settings: Settings, column: Column) -> str | None:
    """The name under which params.yaml has the metric."""
    named = settings.evaluate.metrics.items()
    return next((name for name, numbers in named if numbers.get("method") == column.metric), None)


def _scores(report: Report, metric: str, role: str, side: str) -> Iterator[Score]:
    yield from (s for s in report.scores if (s.metric, s.slice, s.side, s.versus) == (metric, role, side, None))


Measure = Callable[[pd.DataFrame, Any, float], Interval]


def _measure(column: Column, side: str) -> Measure:
    """What a column tells of pictures that stand in rows, with a column for each side."""

    def own(sides: pd.DataFrame, clusters: Any, level: float) -> Interval:
        values = sides[side].to_numpy(float)
        rate = column.kind in ("share", "change")
        return (intervals.rate if rate else intervals.mean)(values, clusters, level)

    def change(sides: pd.DataFrame, clusters: Any, level: float) -> Interval:
        return intervals.difference((sides["candidate"] - sides["base"]).to_numpy(float), clusters, level)

    def relative(sides: pd.DataFrame, clusters: Any, level: float) -> Interval:
        found = intervals.mean((sides["candidate"] - sides["base"]).to_numpy(float), clusters, level)
        base = float(sides["base"].mean())
        ends = sorted((found.low / base, found.high / base))
        return Interval(found.value / base, ends[0], ends[1])

    changes: Mapping[str, Measure] = {"change": change, "relative": relative}
    return own if side == "base" else changes.get(column.kind, own)

"""One cell of a comparison: stages of the ordinary chain, in a folder of its own.

A cell knows what it was made from. Killed anywhere and run again, what is done stays done, what saves goes on, and what
was drawn or looked at is there. Another metric erases nothing and draws nothing.

    made.json            stage → digest of all that it was made from
    cell.json            what the table says of the row beside its numbers; or why there is none
    ../SEED.measured.json  seconds and memory, which differ from run to run
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any

from deleatur import stages
from deleatur.artifacts import tokens
from deleatur.benchmark import plan, resources
from deleatur.benchmark.plan import KEEP, NONE, RATINGS, SHARED, TOKENS, Cell
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.errors import ErasureRefused
from deleatur.runtime import models, provenance
from deleatur.stages import ingest
from deleatur.storage import files, tensors

MADE, FACTS, DOING = "made.json", "cell.json", "doing"


class Stamps:
    """Digests of all that a stage of a cell is made from: settings, code, files, and what was made before it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._recipe = cache(lambda concept, row: plan.recipe(settings, concept, row))
        self._known: dict[tuple[Cell, str], str] = {}

    def of(self, cell: Cell) -> dict[str, str]:
        """By stage, in order."""
        return {stage: self._of(cell, stage) for stage in self._stages(cell)}

    def refused(self, cell: Cell) -> str:
        return str(self._recipe(cell.concept, cell.row)["refused"])

    def _stages(self, cell: Cell) -> list[str]:
        return [name for name in self._recipe(cell.concept, cell.row) if name != "refused"]

    def _of(self, cell: Cell, stage: str) -> str:
        if (cell, stage) not in self._known:
            of = [
                self._recipe(cell.concept, cell.row)[stage],
                cell.seed,
                self._feedback if stage == "ingest" else [self._models, self._prompts(cell.concept)],
                [self._of(*before) for before in self._before(cell, stage)],
            ]
            self._known[cell, stage] = provenance.sha256(of)
        return self._known[cell, stage]

    def _before(self, cell: Cell, stage: str) -> Iterator[tuple[Cell, str]]:
        ratings = replace(cell, row=RATINGS, seed=self._settings.seed)
        tokens, none = replace(cell, row=TOKENS), replace(cell, row=NONE)
        match stage:
            case "reward":
                yield ratings, "ingest"
            case "invert":
                yield ratings, "reward"
            case "erase":
                yield from ((ratings, "reward"), (tokens, "invert"))
            case "attack":
                yield cell, "erase"
            case "sample":
                yield (cell if "attack" in self._stages(cell) else none), "attack"
            case "evaluate":
                yield cell, "sample"

    @cached_property
    def _models(self) -> str:
        return provenance.files_digest(
            sorted(path for path in self._settings.paths.models.rglob("*") if path.is_file())
        )

    @cached_property
    def _feedback(self) -> str:
        sources = ingest.find(self._settings.ingest.sources)
        return provenance.files_digest([*sources, *filter(Path.exists, map(ingest.archive, sources))])

    def _prompts(self, concept: str) -> str:
        return provenance.files_digest([self._settings.paths.prompts, self._settings.concepts[concept].prompts])


def done(settings: Settings, stamps: Stamps, cell: Cell) -> bool:
    """Whether a cell lies there as it would be made now."""
    folder = plan.place(settings, cell)
    return (folder / FACTS).is_file() and _made(folder) == stamps.of(cell)


def measured_of(settings: Settings, stamps: Stamps, cell: Cell) -> resources.Measured | None:
    """What its erasing cost; None where it erases nothing, or was made on another machine."""
    stamp = stamps.of(cell).get("erase", "")
    return resources.read(_measured(settings, cell), stamp) if cell.row != NONE else None


def _measured(settings: Settings, cell: Cell) -> Path:
    return plan.place(settings, cell).with_suffix(".measured.json")


def run(settings: Settings, stamps: Stamps, cell: Cell) -> None:
    """Brings one cell up to date, after those that it stands on: ratings, tokens, `none`."""
    folder = plan.place(settings, cell)
    if why := stamps.refused(cell):
        files.write_json(files.emptied(folder) / FACTS, {"refused": why})
        return
    own, made, wanted = plan.settings_of(settings, cell), _made(folder), stamps.of(cell)
    predictions = None if cell.row in SHARED else _predictions(own)
    for stage, stamp in wanted.items():
        if made.get(stage) == stamp:
            continue
        if made.get(DOING) != stamp:
            shutil.rmtree(own.paths.state, ignore_errors=True)  # of something else
        made = {name: made[name] for name in wanted if made.get(name) == wanted[name]} | {DOING: stamp}
        files.write_json(folder / MADE, made)
        try:
            _stage(settings, own, cell, stage, stamp)
        except ErasureRefused as e:
            files.write_json(files.emptied(folder) / FACTS, {"refused": str(e)})
            break
        made = {name: value for name, value in made.items() if name != DOING} | {stage: stamp}
    else:
        files.write_json(folder / FACTS, {"refused": "", "predictions": predictions, **_facts(own, cell)})
    files.write_json(folder / MADE, wanted)


def _made(folder: Path) -> dict[str, str]:
    return dict(files.read_json(folder / MADE)) if (folder / MADE).is_file() else {}


def _stage(settings: Settings, own: Settings, cell: Cell, stage: str, stamp: str) -> None:
    if stage == "erase":
        with resources.measured(_measured(settings, cell), stamp, own.base.device, resumed=own.paths.state.is_dir()):
            stages.run(stage, own)
        return
    if stage == "sample" and cell.row != NONE:
        _take(plan.settings_of(settings, replace(cell, row=NONE)), own)
    stages.run(stage, own)


def _take(none: Settings, own: Settings) -> None:
    """The untouched model's pictures, and what networks said of them: nobody draws or looks twice."""
    for before, now in ((none.paths.shots, own.paths.shots), (none.paths.scores, own.paths.scores)):
        for shard in before.glob("*/*.parquet"):
            if not (copy := now / shard.relative_to(before)).exists():
                with files.replacing(copy) as partial:
                    shutil.copyfile(shard, partial)


def _predictions(own: Settings) -> int:
    """Of the network, at each sampler step: what a guide costs at every picture. The libraries are loaded after this,
    and are no part of what is measured.
    """
    if methods.eraser(own).one_step is not None:
        return 1
    model, guide = models.base_model(own), methods.guide(own)
    concepts = [tokens.load_concept(own, model, name) for name in own.targets]
    return 1 + sum(len(rows) for rows in guide.conditions(model, concepts).values())


def _facts(own: Settings, cell: Cell) -> dict[str, Any]:
    if cell.row in SHARED:
        return {}
    path = own.paths.delta / tensors.DELTA_FILE
    delta, record = tensors.load_delta(path), files.read_json(own.paths.delta / "record.json")
    changed = own.erase.method != KEEP
    return {
        "method": own.erase.method,
        "source": own.erase.source,
        "guide": own.guide.method,
        "trained": sum(prod(t.shape) for t in delta.tensors.values()),
        "bytes": path.stat().st_size if changed else 0,
        "steps": record.get("kept"),
        "notes": record["notes"] if changed else [],
    }

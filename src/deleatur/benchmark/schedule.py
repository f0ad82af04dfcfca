"""All cells that are missing, one after the other: through DVC where there is a DVC repository, else here."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from deleatur.benchmark import trial as cells
from deleatur.benchmark.plan import NONE, RATINGS, TOKENS, Cell
from deleatur.benchmark.trial import Stamps
from deleatur.config.settings import Settings
from deleatur.runtime.progress import Bar, around, bar
from deleatur.storage import dvc, files

FAMILY, SOURCE = "compare/dvc.yaml", Path("compare/stages.yaml")
"""The stages as DVC reads them, and as git keeps them."""


def cells_of(concepts: Sequence[str], rows: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """Seed by seed: a whole table of the first is there before the second begins."""
    return [Cell(concept, row, seed) for seed in seeds for concept in concepts for row in rows]


def missing(settings: Settings, stamps: Stamps, asked: Sequence[Cell]) -> list[Cell]:
    """Those that do not lie there as they would be made now; rows that cannot be are passed over."""
    return [cell for cell in asked if not stamps.refused(cell) and not cells.done(settings, stamps, cell)]


def run(settings: Settings, stamps: Stamps, ahead: Sequence[Cell]) -> None:
    """Raises what a stage raises; what is done by then is kept, and the same call goes on."""
    if not ahead:
        return
    with around("compare", len(ahead)) as advance:
        if Path(".dvc").is_dir() and SOURCE.is_file():
            with files.replacing(Path(FAMILY)) as partial:
                shutil.copyfile(SOURCE, partial)
            for _, of_seed in groupby(ahead, lambda cell: cell.seed):
                _by_dvc([address(cell) for cell in of_seed], advance)
        else:
            for cell in ahead:
                advance.say(f"{cell.concept} {cell.row} {cell.seed}")
                _here(settings, stamps, cell)
                advance(1)


def address(cell: Cell) -> str:
    """What DVC calls it."""
    if cell.row == NONE:
        return f"{FAMILY}:none@{cell.concept}-{cell.seed}"
    return f"{FAMILY}:row@{cell.concept}-{cell.row}-{cell.seed}"


def _here(settings: Settings, stamps: Stamps, cell: Cell) -> None:
    ratings, tokens = replace(cell, row=RATINGS, seed=settings.seed), replace(cell, row=TOKENS)
    for part in (ratings, tokens, replace(cell, row=NONE), cell):
        if not cells.done(settings, stamps, part):
            cells.run(settings, stamps, part)


def _by_dvc(targets: Sequence[str], advance: Bar) -> None:
    at, what, inner = "", "", advance
    with ExitStack() as below:

        def on_line(line: str) -> None:
            nonlocal at, what
            if found := re.match(r"(?:Running stage|Stage) '([^']+)'", line):
                advance(at in targets)
                at, what = found[1], ""
                below.close()
                advance.say(at.rpartition(":")[2])

        def told(p: dvc.Progress) -> None:
            nonlocal inner, what
            if p.what != what:
                below.close()
                inner, what = below.enter_context(bar(p.what, p.total)), p.what
            inner.at(p.done, p.total, p.note)

        dvc.reproduce_all(targets, Path(), on_line, told)
        advance(at in targets)

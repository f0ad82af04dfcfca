"""What a person sees while a stage works: a bar with the time left; and lines another process can follow."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deleatur.io.versions import PROGRESS


class Bar:
    """Advances a bar; `note` says the newest numbers."""

    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self._progress, self._what, self._total = progress, what, total
        self._task = progress.add_task(what, total=total, note="")
        self._done = self._told = 0

    def at(self, done: int, total: int, note: str = "") -> None:
        """Where work is that counts for itself, and knows how much there is only once it has begun."""
        if total != self._total:
            self._total = total
            self._progress.update(self._task, total=total)
        self(done - self._done, note)

    def __call__(self, n: int = 1, note: str = "") -> None:
        self._done += n
        self._progress.advance(self._task, n)
        if note:
            self._progress.update(self._task, note=note)
        if (self._done - self._told) * 100 >= self._total or self._done == self._total:
            self._told = self._done
            self._tell(note)

    def _tell(self, note: str) -> None:
        line = json.dumps({"what": self._what, "done": self._done, "total": self._total, "note": note})
        if pipe := os.environ.get(PROGRESS):
            with Path(pipe).open("a", encoding="utf-8") as f:
                f.write(line + "\n")


@contextmanager
def bar(what: str, total: int) -> Iterator[Bar]:
    """Inside, a bar on standard error with elapsed and remaining time; one closing line where that is no terminal."""
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(file=sys.stderr, width=None if sys.stderr.isatty() else 110)) as progress:
        yield Bar(progress, what, max(total, 1))

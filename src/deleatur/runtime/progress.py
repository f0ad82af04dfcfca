"""What a person sees while a stage works: a bar with the time left; and lines another process can follow."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from deleatur.storage.dvc import PROGRESS
from deleatur.storage.dvc import Progress as Told


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

    def say(self, what: str) -> None:
        """What is being done now: beside the bar, or a line where that is no terminal."""
        self._progress.update(self._task, note=what)
        if not self._progress.console.is_terminal:
            self._progress.console.print(f"{self._done}/{self._total} {what}", markup=False, highlight=False)

    def remove(self) -> None:
        self._progress.remove_task(self._task)

    def reused(self, n: int) -> None:
        """Pieces that an earlier run did."""
        if n:
            self(n, f"{n} reused")

    def _tell(self, note: str) -> None:
        line = json.dumps({"what": self._what, "done": self._done, "total": self._total, "note": note})
        if pipe := os.environ.get(PROGRESS):
            with Path(pipe).open("a", encoding="utf-8") as f:
                f.write(line + "\n")


_around: ContextVar[Progress | None] = ContextVar("bars that stand around those to come", default=None)


@contextmanager
def bar(what: str, total: int) -> Iterator[Bar]:
    """Inside, a bar on standard error with elapsed and remaining time; one closing line where that is no terminal."""
    if progress := _around.get():
        made = Bar(progress, what, max(total, 1))
        yield made
        made.remove()
        return
    with _bars(_console()) as progress:
        yield Bar(progress, what, max(total, 1))


@contextmanager
def around(what: str, total: int) -> Iterator[Bar]:
    """A bar that stays, with those of what runs inside below it, each as long as it lasts."""
    with _bars(_console()) as progress:
        token = _around.set(progress)
        try:
            yield Bar(progress, what, max(total, 1))
        finally:
            _around.reset(token)


def _console() -> Console:
    return Console(file=sys.stderr, width=None if sys.stderr.isatty() else 110)


class Followed:
    """A stage in another process: its bars on a terminal, as if it ran here; its lines where that is none."""

    def __init__(self, stage: str, progress: Progress) -> None:
        self._progress, self._bars = progress, dict[str, TaskID]()
        self._starting = progress.add_task(stage, total=None, note="")

    def line(self, line: str) -> None:
        if self._progress.disable:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def told(self, p: Told) -> None:
        if not self._bars:
            self._bars[p.what] = self._starting
        elif p.what not in self._bars:  # a stage can have several bars, one after the other
            self._bars[p.what] = self._progress.add_task(p.what, note="")
        bar = self._bars[p.what]
        self._progress.update(bar, description=p.what, completed=p.done, total=max(p.total, 1), note=p.note)

    def ended(self, note: str) -> None:
        if not self._bars:
            self._progress.update(self._starting, completed=1, total=1, note=note)


@contextmanager
def following(stage: str, console: Console) -> Iterator[Followed]:
    with _bars(console, disable=not console.is_terminal) as progress:
        yield Followed(stage, progress)


def _bars(console: Console, *, disable: bool = False) -> Progress:
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    # A step of a large model can take longer than the half minute that the time left is reckoned from by default.
    return Progress(*columns, console=console, disable=disable, speed_estimate_period=600)

"""Progress bars with elapsed and remaining time, on a terminal and across processes."""

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

from deleatur.storage.processes import PROGRESS_ENV, StageProgress


class Bar:
    """One progress bar. `note` is shown behind it, for example the newest loss."""

    def __init__(self, progress: Progress, name: str, total: int) -> None:
        self._progress, self._name, self._total = progress, name, total
        self._task = progress.add_task(name, total=total, note="")
        self._done = self._reported = 0

    def set(self, done: int, total: int, note: str = "") -> None:
        """For work that counts its own steps, and knows their number only once it has started."""
        if total != self._total:
            self._total = total
            self._progress.update(self._task, total=total)
        self(done - self._done, note)

    def __call__(self, n: int = 1, note: str = "") -> None:
        self._done += n
        self._progress.advance(self._task, n)
        if note:
            self._progress.update(self._task, note=note)
        if (self._done - self._reported) * 100 >= self._total or self._done == self._total:
            self._reported = self._done
            self._report(note)

    def describe(self, activity: str) -> None:
        """Shows what is running now: behind the bar, or as a line where the output is no terminal."""
        self._progress.update(self._task, note=activity)
        if not self._progress.console.is_terminal:
            self._progress.console.print(f"{self._done}/{self._total} {activity}", markup=False, highlight=False)

    def remove(self) -> None:
        self._progress.remove_task(self._task)

    def reused(self, n: int) -> None:
        """Advances by items that an earlier run has computed."""
        if n:
            self(n, f"{n} reused")

    def _report(self, note: str) -> None:
        line = json.dumps({"task": self._name, "done": self._done, "total": self._total, "note": note})
        if pipe := os.environ.get(PROGRESS_ENV):
            with Path(pipe).open("a", encoding="utf-8") as f:
                f.write(line + "\n")


_outer: ContextVar[Progress | None] = ContextVar("outer progress display", default=None)


@contextmanager
def bar(name: str, total: int) -> Iterator[Bar]:
    """A bar on standard error with elapsed and remaining time; one closing line where that is no terminal."""
    if progress := _outer.get():
        inner = Bar(progress, name, max(total, 1))
        yield inner
        inner.remove()
        return
    with _display(_console()) as progress:
        yield Bar(progress, name, max(total, 1))


@contextmanager
def outer_bar(name: str, total: int) -> Iterator[Bar]:
    """A bar that stays, while bars of the work inside appear below it."""
    with _display(_console()) as progress:
        token = _outer.set(progress)
        try:
            yield Bar(progress, name, max(total, 1))
        finally:
            _outer.reset(token)


def _console() -> Console:
    return Console(file=sys.stderr, width=None if sys.stderr.isatty() else 110)


class ChildProgress:
    """Shows a stage that runs in a child process: its bars on a terminal, else its lines."""

    def __init__(self, stage: str, progress: Progress) -> None:
        self._progress, self._bars = progress, dict[str, TaskID]()
        self._starting = progress.add_task(stage, total=None, note="")

    def line(self, line: str) -> None:
        if self._progress.disable:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def update(self, p: StageProgress) -> None:
        if not self._bars:
            self._bars[p.task] = self._starting
        elif p.task not in self._bars:  # a stage can have several bars, one after the other
            self._bars[p.task] = self._progress.add_task(p.task, note="")
        bar = self._bars[p.task]
        self._progress.update(bar, description=p.task, completed=p.done, total=max(p.total, 1), note=p.note)

    def finish(self, note: str) -> None:
        if not self._bars:
            self._progress.update(self._starting, completed=1, total=1, note=note)


@contextmanager
def child_progress(stage: str, console: Console) -> Iterator[ChildProgress]:
    with _display(console, disable=not console.is_terminal) as progress:
        yield ChildProgress(stage, progress)


def _display(console: Console, *, disable: bool = False) -> Progress:
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    # A step of a large model can take longer than the 30 s that rich estimates the remaining time from by default.
    return Progress(*columns, console=console, disable=disable, speed_estimate_period=600)

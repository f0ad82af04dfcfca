"""An append-only log of stage runs: when they started, how they ended, and what an eviction cost. One JSON line each.

It is stored beside the checkpoints, one log for each workspace. No stage reads it; a line that cannot be parsed is
skipped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from deleatur.errors import Interrupted

EventKind = Literal["started", "done", "interrupted", "failed", "resumed"]
FILE = "runs.jsonl"


@dataclass(frozen=True)
class Event:
    time: float
    """Unix seconds."""
    stage: str
    kind: EventKind
    """interrupted: on request, with a checkpoint. A run that was killed has a `started` and no end."""
    seconds: float = 0.0
    """Since the run started."""
    lost: int = 0
    """Of a resumed loop: steps after its last checkpoint, which are computed again."""


def append(folder: Path, stage: str, kind: EventKind, *, seconds: float = 0.0, lost: int = 0) -> None:
    _append(folder, [Event(time.time(), stage, kind, round(seconds, 3), lost)])


def merge(folder: Path, text: str) -> None:
    """Adds the events of another workspace's log that are not in this one."""
    known = set(read(folder))
    _append(folder, [event for event in _parse(text) if event not in known])


@contextmanager
def recorded(folder: Path, stage: str) -> Iterator[None]:
    """Logs the start and the end of a stage's run, which is the block."""
    start = time.monotonic()
    append(folder, stage, "started")
    kind: EventKind = "failed"
    try:
        yield
        kind = "done"
    except Interrupted:
        kind = "interrupted"
        raise
    finally:
        append(folder, stage, kind, seconds=time.monotonic() - start)


def read(folder: Path) -> list[Event]:
    """In the order written; empty before the first run."""
    return list(_parse(text(folder)))


def text(folder: Path) -> str:
    """The log as it is on disk, for `merge`."""
    path = folder / FILE
    return path.read_text("utf-8", errors="replace") if path.is_file() else ""


def _append(folder: Path, events: Iterable[Event]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:  # in one write: several stages may run at once
        size = os.fstat(handle).st_size
        # A process that was killed in the middle of a line left no newline.
        newline = "\n" if size and os.pread(handle, 1, size - 1) != b"\n" else ""
        os.write(handle, (newline + "".join(json.dumps(asdict(event)) + "\n" for event in events)).encode())
    finally:
        os.close(handle)


def _parse(text: str) -> Iterator[Event]:
    for line in text.splitlines():
        try:
            yield Event(**json.loads(line))
        except (ValueError, TypeError):
            continue

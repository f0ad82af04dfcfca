"""When stages ran, how they ended, and what an eviction cost: a line of JSON each. Nothing is decided by it.

It lies among the saved states, one for each workspace. A line that cannot be read is passed over.
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

from deleatur.errors import ContinueMe

What = Literal["began", "done", "stopped", "failed", "resumed"]
FILE = "journal.jsonl"


@dataclass(frozen=True)
class Line:
    time: float
    """Unix seconds."""
    stage: str
    what: What
    """stopped: by request, with what it had done saved. A `began` that nothing but another `began` follows: killed."""
    seconds: float = 0.0
    """Since it began."""
    lost: int = 0
    """Of a resumed loop: steps that had been done and were not saved."""


def write(folder: Path, stage: str, what: What, *, seconds: float = 0.0, lost: int = 0) -> None:
    _append(folder, [Line(time.time(), stage, what, round(seconds, 3), lost)])


def adopt(folder: Path, text: str) -> None:
    """Adds the lines of another workspace's journal, those aside that have been added before."""
    known = set(read(folder))
    _append(folder, [line for line in _lines(text) if line not in known])


@contextmanager
def kept(folder: Path, stage: str) -> Iterator[None]:
    """The block is a run of the stage."""
    began = time.monotonic()
    write(folder, stage, "began")
    what: What = "failed"
    try:
        yield
        what = "done"
    except ContinueMe:
        what = "stopped"
        raise
    finally:
        write(folder, stage, what, seconds=time.monotonic() - began)


def read(folder: Path) -> list[Line]:
    """In the order written. Nobody has run anything yet: no line."""
    return list(_lines(text(folder)))


def text(folder: Path) -> str:
    """As it stands on the disk, for `adopt`."""
    path = folder / FILE
    return path.read_text("utf-8", errors="replace") if path.is_file() else ""


def _append(folder: Path, lines: Iterable[Line]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:  # in one piece: several stages may run at once
        size = os.fstat(handle).st_size
        torn = "\n" if size and os.pread(handle, 1, size - 1) != b"\n" else ""  # killed in the middle of a line
        os.write(handle, (torn + "".join(json.dumps(asdict(line)) + "\n" for line in lines)).encode())
    finally:
        os.close(handle)


def _lines(text: str) -> Iterator[Line]:
    for line in text.splitlines():
        try:
            yield Line(**json.loads(line))
        except (ValueError, TypeError):
            continue

"""When stages ran, how they ended, and what an eviction cost: a line of JSON each. Nothing is decided by it.

It lies among the saved states, one for each workspace. A line that cannot be read is passed over.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
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
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps(asdict(Line(time.time(), stage, what, round(seconds, 3), lost))) + "\n"
    handle = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, line.encode())  # in one piece: several stages may run at once
    finally:
        os.close(handle)


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
    path = folder / FILE
    return list(_lines(path.read_text("utf-8", errors="replace"))) if path.is_file() else []


def _lines(text: str) -> Iterator[Line]:
    for line in text.splitlines():
        try:
            yield Line(**json.loads(line))
        except (ValueError, TypeError):
            continue

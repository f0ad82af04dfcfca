"""What erasing costs: seconds and memory, in a file beside what it makes, which is the same on every machine."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from deleatur.diffusion.model import device_of
from deleatur.storage import files


@dataclass(frozen=True)
class Measured:
    of: str
    """What was made; a record of something else is none."""
    seconds: float
    """Networks are loaded in them too."""
    memory: int | None
    """Most bytes at a time that the process, or the GPU, held beyond what it held before. None: nobody can tell."""
    device: str
    complete: bool
    """Every part of it was measured; not where a process was killed on the way."""


def read(path: Path, of: str) -> Measured | None:
    found = Measured(**files.read_json(path)) if path.is_file() else None
    return found if found and found.of == of else None


@contextmanager
def measured(path: Path, of: str, device: str, *, resumed: bool) -> Iterator[None]:
    """Measures the block and writes the file, also where the block is left before its end, to be gone on with.

    resumed: the block goes on where an earlier one was left; what that one took is added.
    """
    before = read(path, of) if resumed else None
    at, complete = device_of(device), before.complete if before else not resumed
    none = Measured(of, 0.0, None, _name(at), False)
    files.write_json(path, asdict(none if before is None else replace(before, complete=False)))
    held, began = _forget_peak(at), time.perf_counter()
    try:
        yield
    finally:
        seconds, peak = time.perf_counter() - began, _peak(at)
        memory = None if held is None or peak is None else max(0, peak - held)
        now = Measured(of, seconds, memory, _name(at), complete)
        files.write_json(path, asdict(now if before is None else _sum(before, now)))


def _sum(one: Measured, other: Measured) -> Measured:
    known = [m for m in (one.memory, other.memory) if m is not None]
    device = one.device if one.device == other.device else f"{one.device}; {other.device}"
    return replace(other, seconds=one.seconds + other.seconds, memory=max(known, default=None), device=device)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def _forget_peak(device: torch.device) -> int | None:
    """Bytes held now, from where the peak counts from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM starts anew at VmRSS
    except OSError:
        return None
    return _kernel("VmRSS")


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _kernel("VmHWM")


def _kernel(what: str) -> int | None:
    try:
        found = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None

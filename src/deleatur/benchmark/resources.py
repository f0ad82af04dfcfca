"""Seconds and memory of an erasure, in a file beside its outputs, which are the same on every machine."""

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

from deleatur.diffusion.model import resolve_device
from deleatur.storage import files


@dataclass(frozen=True)
class ResourceUsage:
    """The measured cost of one run of a stage."""

    subject: str
    """Digest of what was run; a record of another digest does not count."""
    seconds: float
    """With the loading of networks."""
    memory: int | None
    """Peak bytes of the process, or on the GPU, beyond those at the start. None: the system does not report them."""
    device: str
    complete: bool
    """Whether all parts were measured; False where a process was killed."""


def read(path: Path, subject: str) -> ResourceUsage | None:
    """The recorded usage; None where there is none for this subject."""
    if not path.is_file():
        return None
    usage = files.read_json_as(path, ResourceUsage, hint=f"rm {path}, then: deleatur compare")
    return usage if usage.subject == subject else None


@contextmanager
def measure(path: Path, subject: str, device: str, *, resumed: bool) -> Iterator[None]:
    """Measures the block and writes the file, also where the block is interrupted.

    resumed: the block resumes an interrupted one, whose usage is added.
    """
    earlier = read(path, subject) if resumed else None
    torch_device, complete = resolve_device(device), earlier.complete if earlier else not resumed
    none = ResourceUsage(subject, 0.0, None, _device_name(torch_device), False)
    # A process that is killed below leaves this record, which says that a part is missing.
    files.write_json(path, asdict(none if earlier is None else replace(earlier, complete=False)))
    bytes_at_start, started = _reset_peak(torch_device), time.perf_counter()
    try:
        yield
    finally:
        seconds, peak = time.perf_counter() - started, _peak_bytes(torch_device)
        memory = None if bytes_at_start is None or peak is None else max(0, peak - bytes_at_start)
        usage = ResourceUsage(subject, seconds, memory, _device_name(torch_device), complete)
        files.write_json(path, asdict(usage if earlier is None else _add(earlier, usage)))


def _add(earlier: ResourceUsage, later: ResourceUsage) -> ResourceUsage:
    peaks = [u.memory for u in (earlier, later) if u.memory is not None]
    device = earlier.device if earlier.device == later.device else f"{earlier.device}; {later.device}"
    return replace(later, seconds=earlier.seconds + later.seconds, memory=max(peaks, default=None), device=device)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def _reset_peak(device: torch.device) -> int | None:
    """Resets the peak; returns the bytes in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM is set to VmRSS
    except OSError:
        return None
    return _process_bytes("VmRSS")


def _peak_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _process_bytes("VmHWM")


def _process_bytes(counter: str) -> int | None:
    try:
        match = re.search(rf"^{counter}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None

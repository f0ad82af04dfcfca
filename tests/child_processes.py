"""Stages and functions as processes that tests can kill. A fork server has imported their dependencies."""

from __future__ import annotations

import json
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "diffusers.models.autoencoders.autoencoder_kl",
        "diffusers.models.unets.unet_2d_condition",
        "diffusers.schedulers.scheduling_ddim",
        "transformers.models.clip.modeling_clip",
        "transformers.models.clip.processing_clip",
        *(f"deleatur.stages.{name}" for name in ("invert", "erase", "attack", "gate")),
        "deleatur.cli",
    ]
)


def _run_stage(root: Path, name: str, progress_file: Path, save_every_step: bool, fatal_save: int) -> None:
    """`deleatur stage NAME`, optionally saving after every step, or killed while it writes a checkpoint."""
    from deleatur.cli import app
    from deleatur.runtime import checkpoint
    from deleatur.storage import tensors
    from deleatur.storage.processes import PROGRESS_ENV

    os.chdir(root)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    os.environ[PROGRESS_ENV] = str(progress_file)
    if save_every_step:
        checkpoint.interval, checkpoint.MAX_OVERHEAD = lambda settings: 0.0, math.inf
    written = 0
    plain = tensors.save_file

    def save_file(values: Any, path: Path, metadata: dict[str, str]) -> None:
        nonlocal written
        written += 1
        plain(values, path, metadata=metadata)
        if written == fatal_save:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    tensors.save_file = save_file
    app(["stage", name])


class StageProcess:
    """A running stage."""

    def __init__(self, root: Path, name: str, *, saves: bool = True, fatal_save: int = 0) -> None:
        self._progress_file = root / f"{name}.progress"
        self._progress_file.unlink(missing_ok=True)
        arguments = (root, name, self._progress_file, saves, fatal_save)
        self._process: ForkServerProcess = CONTEXT.Process(target=_run_stage, args=arguments)
        self._process.start()

    @property
    def progress(self) -> list[dict[str, Any]]:
        """Progress reported so far."""
        with suppress(FileNotFoundError):
            return [
                json.loads(line) for line in self._progress_file.read_text("utf-8").splitlines() if line.endswith("}")
            ]
        return []

    def signal_at(self, step: int, signum: signal.Signals) -> int:
        """Sends a signal once a step is done; returns the exit code."""
        while self._process.is_alive() and not any(line["done"] >= step for line in self.progress):
            time.sleep(0.001)
        assert self._process.pid is not None
        os.kill(self._process.pid, signum)
        return self.wait()

    def wait(self) -> int:
        """Waits for the end; returns the exit code, negative for a signal."""
        self._process.join(120)
        assert self._process.exitcode is not None, "still running"
        return self._process.exitcode


def stage_processes(name: str, parent: int) -> Iterator[psutil.Process]:
    """The processes of a stage among the descendants of a process."""
    for process in psutil.Process(parent).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.cmdline()[-2:] == ["stage", name]:
                yield process


def killed(function: Callable[[], object], before: Callable[[], object] = lambda: None) -> bool:
    """Runs a function in a child process, after `before`, which arranges its death. Returns whether it was killed."""
    with temporary_folder():
        child = os.fork()
        if child == 0:
            try:
                before()
                function()
            finally:
                os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Temporary files of this process and its children go into a folder that is deleted afterwards: a process that is
    killed leaves its own.
    """
    with TemporaryDirectory(prefix="killed-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)

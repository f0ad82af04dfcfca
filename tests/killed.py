"""Stages as processes that can be killed. Python's fork server has imported what they need: one starts in no time."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil

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


def _stage(root: Path, name: str, progress: Path, saves: bool, dies_at_save: int) -> None:
    """`deleatur stage NAME`, saving after every step if so asked, killed in the middle of writing a save."""
    from deleatur.cli import app
    from deleatur.runtime import checkpoint
    from deleatur.storage import tensors
    from deleatur.storage.dvc import PROGRESS

    os.chdir(root)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    os.environ[PROGRESS] = str(progress)
    if saves:
        checkpoint.every, checkpoint.SHARE = lambda settings: 0.0, math.inf
    written = 0
    plain = tensors.save_file

    def save_file(values: Any, path: Path, metadata: dict[str, str]) -> None:
        nonlocal written
        written += 1
        plain(values, path, metadata=metadata)
        if written == dies_at_save:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    tensors.save_file = save_file
    app(["stage", name])


class Stage:
    """A stage that is running."""

    def __init__(self, root: Path, name: str, *, saves: bool = True, dies_at_save: int = 0) -> None:
        self._lines = root / f"{name}.progress"
        self._lines.unlink(missing_ok=True)
        arguments = (root, name, self._lines, saves, dies_at_save)
        self._process: ForkServerProcess = CONTEXT.Process(target=_stage, args=arguments)
        self._process.start()

    @property
    def told(self) -> list[dict[str, Any]]:
        """Its progress so far."""
        with suppress(FileNotFoundError):
            return [json.loads(line) for line in self._lines.read_text("utf-8").splitlines() if line.endswith("}")]
        return []

    def hit(self, step: int, how: signal.Signals) -> int:
        """Sends a signal as soon as the step is done; the exit code."""
        while self._process.is_alive() and not any(line["done"] >= step for line in self.told):
            time.sleep(0.001)
        assert self._process.pid is not None
        os.kill(self._process.pid, how)
        return self.end()

    def end(self) -> int:
        """Waits for it; the exit code, negative for a signal."""
        self._process.join(120)
        assert self._process.exitcode is not None, "it still runs"
        return self._process.exitcode


def running(name: str, starter: int) -> Iterator[psutil.Process]:
    """The processes of a stage among those that a process has started, and those these have."""
    for process in psutil.Process(starter).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.cmdline()[-2:] == ["stage", name]:
                yield process

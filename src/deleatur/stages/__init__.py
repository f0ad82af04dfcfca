"""The stages of the pipeline, one function `run(settings)` each: read inputs, call the rooms below, write outputs."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path

from deleatur.config.settings import Settings
from deleatur.dependencies import STAGES
from deleatur.errors import Interrupted, SettingsError
from deleatur.runtime import event_log
from deleatur.storage.processes import PARENT_LOCK_ENV

__all__ = ["STAGES", "run"]


def run(name: str, settings: Settings) -> None:
    """Runs one stage. Raises SettingsError for an unknown name, and Interrupted on SIGINT or SIGTERM."""
    if name not in STAGES:
        raise SettingsError(f"no stage {name!r}: stages are {', '.join(STAGES)}", hint="deleatur stage --help")
    with event_log.recorded(settings.paths.checkpoints, name), _interruptible(name):
        import_module(f"deleatur.stages.{name}").run(settings)


@contextmanager
def _interruptible(name: str) -> Iterator[None]:
    """Turns SIGINT and SIGTERM into Interrupted. Checkpointed loops save first: see `runtime.checkpoint`."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    if main and (lock := os.environ.get(PARENT_LOCK_ENV)):
        threading.Thread(target=_stop_when_orphaned, args=(lock,), daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            f"{name} was interrupted; its checkpoint is kept", hint="run the same command to resume"
        ) from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _stop_when_orphaned(lock: str) -> None:
    """Sends SIGTERM to this process when its parent, which holds the lock, has died."""
    with suppress(FileNotFoundError), Path(lock).open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # blocks until the parent ends
    os.kill(os.getpid(), signal.SIGTERM)

"""A stage is one function, `run(settings)`: read → call → write, a page each."""

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
from deleatur.errors import ContinueMe, SettingsError
from deleatur.runtime import event_log
from deleatur.storage.dvc import FOLLOWED

__all__ = ["STAGES", "run"]


def run(name: str, settings: Settings) -> None:
    """Runs one stage. Raises SettingsError when there is none of that name, ContinueMe when it was asked to stop."""
    if name not in STAGES:
        raise SettingsError(f"no stage {name!r}: there is {', '.join(STAGES)}", hint="deleatur stage --help")
    with event_log.kept(settings.paths.state, name), _stoppable(name):
        import_module(f"deleatur.stages.{name}").run(settings)


@contextmanager
def _stoppable(name: str) -> Iterator[None]:
    """SIGTERM is what Ctrl-C is, and either of them is no accident. Loops that save do so first: see `checkpoint`."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    if main and (lock := os.environ.get(FOLLOWED)):
        threading.Thread(target=_stop_when_left, args=(lock,), daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        raise ContinueMe(f"{name} was stopped; what it had saved is kept", hint="the same command, to go on") from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _stop_when_left(lock: str) -> None:
    """Asks this process to stop once nobody follows it any more."""
    with suppress(FileNotFoundError), Path(lock).open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # waits
    os.kill(os.getpid(), signal.SIGTERM)

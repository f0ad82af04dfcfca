"""Child processes: commands whose output is captured, and stages whose output and progress are followed."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from tempfile import TemporaryDirectory

from deleatur.errors import Interrupted, ServiceError

PROGRESS_ENV = "DELEATUR_PROGRESS"
"""Environment variable: the file to which a stage appends its progress, one JSON object per line."""

PARENT_LOCK_ENV = "DELEATUR_PARENT_LOCK"
"""Environment variable: a file that the parent process keeps locked while it lives. The kernel releases the lock even
when the parent is killed, and the stage then stops instead of computing on unattended."""

POLL_INTERVAL = 0.2
"""Seconds between two polls of a child process."""

GRACE_PERIOD = 60.0
"""Seconds between SIGTERM and SIGKILL, in which a child saves its state."""

TAIL_LINES = 30
"""Last output lines of a child that are searched for its error message."""

UNBUFFERED_ENV = {"COLUMNS": "400", "PYTHONUNBUFFERED": "1"}
"""Environment of a child whose output is read line by line: no wrapping, no buffering."""


@dataclass(frozen=True)
class StageProgress:
    """Progress of a stage: `done` of `total` units of `task`; `note` holds the newest metrics."""

    task: str
    done: int
    total: int
    note: str


def run_command(
    command: Sequence[str], root: Path, on_line: Callable[[str], None], on_progress: Callable[[StageProgress], None]
) -> tuple[int, list[str]]:
    """Runs a command in `root`, forwarding output lines and progress; returns its exit code and last lines.

    The command gets a process group of its own, which does not outlive this call: it is sent SIGTERM and, after
    GRACE_PERIOD seconds, SIGKILL.
    """
    with TemporaryDirectory(prefix="deleatur-") as directory, _sigterm_unwinds():
        progress_file = Path(directory) / "progress"
        progress_file.touch()
        with progress_file.open(encoding="utf-8") as progress:
            # Held for as long as this process lives: a stage waits for it in a thread, and stops once it gets it.
            fcntl.flock(progress, fcntl.LOCK_EX)
            child = subprocess.Popen(
                command,
                cwd=root,
                env={
                    **environment(root),
                    **UNBUFFERED_ENV,
                    PROGRESS_ENV: str(progress_file),
                    PARENT_LOCK_ENV: str(progress_file),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                # A process group of its own: Ctrl-C reaches this process alone, which then ends DVC and the stage.
                start_new_session=True,
            )
            # Reading a pipe blocks, so a thread does it, and this one can look for progress and for the child's end.
            lines: Queue[str] = Queue()
            reader = threading.Thread(target=_read_lines, args=(child, lines), daemon=True)
            reader.start()
            tail: deque[str] = deque(maxlen=TAIL_LINES)

            def drain() -> None:
                for line in filter(str.strip, _available_lines(lines)):
                    tail.append(line)
                    on_line(line)
                for line in progress:
                    on_progress(StageProgress(**json.loads(line)))

            try:
                while child.poll() is None:
                    drain()
            finally:
                _terminate_group(child)
                reader.join()
                drain()  # what the child wrote while it was ending, an error message above all
        return child.returncode, list(tail)


def run_captured(command: Sequence[str], root: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command in `root` and captures its output. Raises ServiceError if it is not installed."""
    try:
        return subprocess.run(command, cwd=root, env=environment(root), capture_output=True, text=True)
    except FileNotFoundError as e:
        raise ServiceError(f"{command[0]} is not installed", hint=f"install {command[0]}") from e


def environment(root: Path = Path()) -> dict[str, str]:
    """Environment of a child process that runs DVC. The commands of dvc.yaml call `deleatur`: PATH makes it available
    without an activated venv, PYTHONPATH makes it the checkout below `root`, whose sources DVC tracks.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    # A git hook sets these, and they would override the repository of `root`.
    env = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    source = root.resolve() / "src"
    if (source / "deleatur").is_dir():
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(source), env.get("PYTHONPATH")]))
    return env | {"DVC_NO_ANALYTICS": "1", "PATH": path, "LC_ALL": "C.UTF-8"}


def last_line(lines: Sequence[str]) -> str:
    return next(iter(reversed(lines)), "no output")


def _read_lines(child: subprocess.Popen[str], lines: Queue[str]) -> None:
    assert child.stdout is not None
    with child.stdout as stream:
        for line in stream:
            lines.put(line.rstrip())


def _available_lines(lines: Queue[str]) -> Iterator[str]:
    """Lines that have arrived, waiting at most POLL_INTERVAL for the first."""
    with suppress(Empty):
        yield lines.get(timeout=POLL_INTERVAL)
        while True:
            yield lines.get_nowait()


def _terminate_group(child: subprocess.Popen[str]) -> None:
    """Ends every process of the child's group and reaps the child."""
    _signal_group(child, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_PERIOD
    while _signal_group(child, 0) and time.monotonic() < deadline:
        child.poll()  # reap: a zombie would still count as a member of the group
        time.sleep(POLL_INTERVAL / 4)
    _signal_group(child, signal.SIGKILL)
    child.wait()


def _signal_group(child: subprocess.Popen[str], signum: int) -> bool:
    """Signals the child's process group; False when no process of it is left."""
    try:
        os.killpg(child.pid, signum)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Inside, SIGTERM unwinds the stack as SIGINT does, with the exit code of Interrupted, unless a handler is set."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(Interrupted.exit_code))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

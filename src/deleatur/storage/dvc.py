"""DVC and git, only ever as child processes: `dvc.repo.Repo` wants the whole process to change directory.

A stage is reproduced by `dvc repro --single-item NAME`: DVC runs it if what it stands on has changed, and remembers.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from queue import Empty, Queue
from tempfile import TemporaryDirectory
from typing import Any

from deleatur import dependencies
from deleatur.errors import (
    ContinueMe,
    DataError,
    DeleaturError,
    ErasureRefused,
    ModelError,
    ServiceError,
    SettingsError,
)

PROGRESS = "DELEATUR_PROGRESS"
"""Environment variable through which a stage is told where to write its progress, one JSON line at a time."""

PULL = ("--pull",)

FOLLOWED = "DELEATUR_FOLLOWED"
"""Environment variable with a file that is locked for as long as somebody follows the stage. A follower that is killed
cannot say goodbye, and nothing shall compute on for nobody."""

CODE = "code"
"""The stage that writes digests of code. DVC cannot know that a package was installed: we look before we ask."""

LOOK = 0.2
"""Seconds between two looks at a child."""
GRACE = 60.0
"""Seconds that a child which was asked to stop has for saving its state."""
TAIL = 30
"""Last lines of a child that are kept to say what went wrong."""

KINDS: tuple[type[DeleaturError], ...] = (SettingsError, DataError, ModelError, ErasureRefused, ContinueMe)
"""What a stage can end with that has an exit code of its own; all else may be gone at the next try."""

READ_BY_US = {"COLUMNS": "400", "PYTHONUNBUFFERED": "1"}
"""Environment of a child whose lines we read: none is folded, none comes late."""


@dataclass(frozen=True)
class Progress:
    """How far a stage is. `done` of `total` pieces of `what`; `note` has its newest numbers."""

    what: str
    done: int
    total: int
    note: str


@dataclass(frozen=True)
class Commit:
    hash: str | None
    """None: there is no git repository, or it has no commit yet."""
    dirty: bool
    """Whether tracked files differ from the commit."""


def reproduce(
    stage: str,
    root: Path,
    on_line: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    how: Sequence[str] = (),
) -> bool:
    """Brings one stage of dvc.yaml up to date with what lies before it; whether it had to run.

    how: options of `dvc repro`. With PULL, what was made elsewhere from the same is taken from the DVC remote. What the
    stage reads has to be here: DVC takes what is missing for unchanged.

    Raises what the stage itself raised (ContinueMe and ServiceError are worth another try, the others are not),
    ServiceError when it was killed or broke down, and DataError when DVC refused to run it. Whoever interrupts us
    interrupts the stage: it is asked to save its state, and waited for. The interruption itself is what is raised then,
    and no error of ours, which a scheduler would take for one more reason to try again.
    """
    ran = False

    def listen(line: str) -> None:
        nonlocal ran
        ran = ran or line == f"Running stage '{stage}':"
        on_line(line)

    _refresh_digests(root)
    code, tail = follow(dvc("repro", "--single-item", *how, stage), root, listen, on_progress)
    if code:
        raise _failure(stage, root, tail)
    return ran


def reproduce_all(
    targets: Sequence[str],
    root: Path,
    on_line: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Brings stages of any dvc.yaml up to date, and all that lies before them. Raises as `reproduce` does, at the first
    that fails.
    """
    _refresh_digests(root)
    code, tail = follow(dvc("repro", *targets), root, on_line, on_progress)
    if code:
        raise _failure(" ".join(targets), root, tail)


def perform(
    stage: str,
    root: Path,
    on_line: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Runs a stage that DVC does not know because it makes no file: `register`. Raises as `reproduce` does."""
    code, tail = follow([sys.executable, "-m", "deleatur", "stage", stage], root, on_line, on_progress)
    if code:
        raise _error(stage, code, tail)


def status(root: Path, stage: str = "dvc.yaml") -> dict[str, Any]:
    """Stage → what has changed since it ran; empty when all is up to date, or where there is no DVC repository."""
    if not (root / ".dvc").is_dir():
        return {}
    _refresh_digests(root)
    done = quietly(dvc("status", "--json", stage), root)
    if done.returncode:
        said = last(done.stderr.splitlines())
        raise DataError(f"DVC cannot tell what is up to date: {said}", hint=_unversioned(root) or "dvc status")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _refresh_digests(root: Path) -> None:
    """DVC takes what we found for what its stage made: left to itself it would put back what it knows."""
    if dependencies.write(root) and (root / ".dvc").is_dir():
        quietly(dvc("commit", "--force", "--quiet", CODE), root)


def lock_digest(root: Path) -> str | None:
    """SHA-256 of dvc.lock, which names every input and output by digest."""
    lock = root / "dvc.lock"
    return hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else None


def commit(root: Path) -> Commit:
    """Which code this is."""
    head = quietly(["git", "rev-parse", "--verify", "--quiet", "HEAD"], root)
    changed = quietly(["git", "status", "--porcelain", "--untracked-files=no"], root)
    return Commit(head.stdout.strip() or None, bool(changed.stdout.strip()))


def author(root: Path) -> str | None:
    """Who git says works here; none where there is no git, or nobody has told it."""
    if not shutil.which("git"):
        return None
    return quietly(["git", "config", "user.name"], root).stdout.strip() or None


def tracked(folder: Path) -> str | None:
    """The first of the files that git keeps in a folder; none where there is no git, or no repository.

    Raises DataError where git cannot tell: whoever asks is about to delete.
    """
    if not shutil.which("git"):
        return None
    listed = quietly(["git", "ls-files", "--", "."], folder)
    if listed.returncode and "not a git repository" not in listed.stderr:
        raise DataError(f"git cannot tell what it keeps in {folder}: {last(listed.stderr.splitlines())}")
    return next(iter(listed.stdout.splitlines()), None)


def environment(root: Path = Path()) -> dict[str, str]:
    """Ours, for a child that runs DVC: stages say `deleatur`, which has to be found where no venv is activated too, and
    has to be the code that lies here, which DVC watches.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    # Within a git hook these name the repository, whatever folder a command is for.
    ours = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    source = root.resolve() / "src"
    if (source / "deleatur").is_dir():
        ours["PYTHONPATH"] = os.pathsep.join(filter(None, [str(source), ours.get("PYTHONPATH")]))
    return ours | {"DVC_NO_ANALYTICS": "1", "PATH": path, "LC_ALL": "C.UTF-8"}


def follow(
    command: Sequence[str], root: Path, on_line: Callable[[str], None], on_progress: Callable[[Progress], None]
) -> tuple[int, list[str]]:
    """Runs a command in `root` to its end and tells of it meanwhile: exit code and last lines.

    It gets a process group of its own, which ends with us: by SIGTERM and GRACE seconds later by SIGKILL.
    """
    with TemporaryDirectory(prefix="deleatur-") as place, _terminable():
        pipe = Path(place) / "progress"
        pipe.touch()
        with pipe.open(encoding="utf-8") as progress:
            fcntl.flock(progress, fcntl.LOCK_EX)
            child = subprocess.Popen(
                command,
                cwd=root,
                env={**environment(root), **READ_BY_US, PROGRESS: str(pipe), FOLLOWED: str(pipe)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            lines: Queue[str] = Queue()
            reader = threading.Thread(target=_read, args=(child, lines), daemon=True)
            reader.start()
            tail: deque[str] = deque(maxlen=TAIL)

            def tell() -> None:
                for line in filter(str.strip, _waiting(lines)):
                    tail.append(line)
                    on_line(line)
                for line in progress:
                    on_progress(Progress(**json.loads(line)))

            try:
                while child.poll() is None:
                    tell()
            finally:
                _end(child)
                reader.join()
                tell()
        return child.returncode, list(tail)


def dvc(command: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "dvc", "--wait-for-lock", command, *arguments]


def quietly(command: Sequence[str], root: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, cwd=root, env=environment(root), capture_output=True, text=True)
    except FileNotFoundError as e:
        raise ServiceError(f"{command[0]} is not installed", hint=f"install {command[0]}") from e


def _read(child: subprocess.Popen[str], lines: Queue[str]) -> None:
    assert child.stdout is not None
    with child.stdout as stream:
        for line in stream:
            lines.put(line.rstrip())


def _waiting(lines: Queue[str]) -> Iterator[str]:
    """The lines that are there, or that come within one look."""
    with suppress(Empty):
        yield lines.get(timeout=LOOK)
        while True:
            yield lines.get_nowait()


def _end(child: subprocess.Popen[str]) -> None:
    """Nothing of the child's process group outlives this."""
    _signal(child, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while _signal(child, 0) and time.monotonic() < deadline:
        child.poll()  # or the child, ended but not waited for, would count as alive
        time.sleep(LOOK / 4)
    _signal(child, signal.SIGKILL)
    child.wait()


def _signal(child: subprocess.Popen[str], number: int) -> bool:
    """Whether there was anybody left to hear it."""
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        return False
    return True


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM unwinds the stack as Ctrl-C does, where nobody has arranged something else; the exit code says go on."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ContinueMe.exit_code))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _failure(stage: str, root: Path, tail: Sequence[str]) -> DeleaturError:
    """What a `dvc repro` that failed has to say: the stage's own error, or DVC's."""
    for line in reversed(tail):
        if found := re.search(r"failed to reproduce '([^']+)'.* exited with (-?\d+)", line):
            return _error(found[1], int(found[2]), tail)
    return DataError(f"DVC did not run {stage}: {last(tail)}", hint=_unversioned(root) or f"dvc repro {stage}")


def _unversioned(root: Path) -> str:
    """The command that makes of a folder what DVC can work in; none where it is that."""
    if quietly(["git", "rev-parse", "--git-dir"], root).returncode:
        return "git init" if (root / ".dvc").is_dir() else "git init && dvc init"
    return "" if (root / ".dvc").is_dir() else "dvc init"


def _error(stage: str, code: int, tail: Sequence[str]) -> DeleaturError:
    """A stage's exit code and last lines as the error that it raised."""
    kind = next((k for k in KINDS if k.exit_code == code), ServiceError)
    said = [i for i, line in enumerate(tail) if line.startswith(f"{kind.__name__}: ")]
    again = f"dvc repro {stage}" if ":" in stage else f"deleatur stage {stage}"
    if not said:
        return kind(f"{stage} broke down with exit code {code}: {last(tail)}", hint=again)
    words = list(takewhile(lambda line: not line.startswith(("Next: ", "ERROR: ")), tail[said[-1] :]))
    hints = [line.removeprefix("Next: ") for line in tail[said[-1] :] if line.startswith("Next: ")]
    message = "\n".join(words).removeprefix(f"{kind.__name__}: ")
    return kind(f"{stage}: {message.strip()}", hint=hints[0] if hints else again)


def last(lines: Sequence[str]) -> str:
    return next(iter(reversed(lines)), "it said nothing")

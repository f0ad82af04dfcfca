"""The ledger: one line of JSON for each decision about a release, each with the SHA-256 of the line before.

    sed -n 3p ledger.jsonl | tr -d '\\n' | sha256sum     is what `previous` says in line 4

Lines are only ever appended, by one process at a time. A line counts when its end is there: what a killed process left
without one was never decided, and the next writer cuts it off. That lines are missing at the end, or that the last one
was changed, no chain can tell: the registry keeps the hash of the last line, see `tracking.Registry.mark`.
"""

from __future__ import annotations

import fcntl
import getpass
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from socket import gethostname
from typing import Literal

from deleatur.errors import DataError
from deleatur.storage import json_records

ANEW = "restore it from the backup or, where it is lost: deleatur settle --adopt --as NAME --reason WHY"


Event = Literal[
    "registration",
    "approval",
    "decline",
    "expiry",
    "voiding",
    "promotion",
    "rollback",
    "quarantine",
    "settlement",
    "adoption",
]


@dataclass(frozen=True)
class Subject:
    """What a decision about a release is about."""

    version: str | None
    """None: the verdict made none."""
    weights: str
    """Digest of the delta."""
    evidence: str
    """Digest of the verdict, which names all it rests on."""
    files: str = ""
    """Digest of the statement that names the version's files, see `signing`; empty: there is none."""


@dataclass(frozen=True)
class Entry:
    """One line of the ledger: what was decided about a version, and what the aliases say from then on."""

    number: int
    time: str
    """UTC, ISO 8601, to the second."""
    event: Event
    version: str | None
    who: str
    """Whose word it is, as they gave it. Of a registration: who started the run."""
    account: str
    """Account and machine that wrote the line."""
    why: str
    weights: str
    evidence: str
    files: str
    """Like weights and evidence as in `Subject`."""
    aliases: Mapping[str, str]
    """Alias → version: all of ours, whether this line moved them or not."""
    previous: str
    """SHA-256 of the line before, of its bytes without the line's end."""


@dataclass(frozen=True)
class Mark:
    """A line, by number and SHA-256."""

    number: int
    hash: str

    def __str__(self) -> str:
        return f"{self.number}:{self.hash}"

    @classmethod
    def read(cls, text: str) -> Mark:
        number, _, digest = text.partition(":")
        return cls(int(number), digest)


NONE = Mark(0, "0" * 64)
"""Before the first line."""


@dataclass(frozen=True)
class Ledger:
    """What the file holds."""

    path: Path
    base: Mark
    """The line that the first one follows: none, or the last of a ledger that was lost."""
    entries: tuple[Entry, ...]
    """Up to the first that is not as it was written."""
    marks: tuple[Mark, ...]
    """Of each entry."""
    torn: int = 0
    """Bytes of a last line that was never finished."""
    problem: str = ""
    """Where the chain does not hold, and how; empty: it is whole."""

    @property
    def head(self) -> Mark:
        return self.marks[-1] if self.marks else self.base

    @property
    def aliases(self) -> Mapping[str, str]:
        """What the aliases are to say."""
        return self.entries[-1].aliases if self.entries else {}

    def demand_whole(self) -> None:
        """Raises DataError where the chain does not hold."""
        if self.problem:
            raise DataError(self.problem, hint=ANEW)

    def after(self, mark: Mark | None) -> tuple[Entry, ...]:
        """What was decided since the line that the registry knows as the last; None: it knows of no ledger.

        Raises DataError where that line is not here, or is another one.
        """
        if mark in (None, self.base):
            return self.entries
        if mark not in self.marks:
            assert mark is not None
            held = f"it ends with line {self.head.number}" if mark.number > self.head.number else "it holds another one"
            raise DataError(
                f"the registry knows line {mark.number} of {self.path} as {mark.hash[:12]}…, and {held}: lines were "
                "removed or changed, or this is the ledger of another registry",
                hint=ANEW,
            )
        return self.entries[self.marks.index(mark) + 1 :]


class Book:
    """The ledger in the hands of the one process that may append to it."""

    def __init__(self, file: FileIO, ledger: Ledger) -> None:
        self._file, self.ledger = file, ledger

    def append(self, event: Event, about: Subject, who: str, why: str, aliases: Mapping[str, str]) -> None:
        """On the disk when this returns: from then on it is decided. Raises DataError where the chain does not hold."""
        self.ledger.demand_whole()
        head = self.ledger.head
        entry = Entry(
            number=head.number + 1,
            time=now().isoformat(timespec="seconds"),
            event=event,
            version=about.version,
            who=who,
            account=f"{account()}@{gethostname()}",
            why=why,
            weights=about.weights,
            evidence=about.evidence,
            files=about.files,
            aliases=dict(sorted(aliases.items())),
            previous=head.hash,
        )
        line = json.dumps(asdict(entry), ensure_ascii=False, separators=(",", ":")).encode()
        _put(self._file, line + b"\n")
        entries, marks = (*self.ledger.entries, entry), (*self.ledger.marks, _mark(entry.number, line))
        self.ledger = replace(self.ledger, entries=entries, marks=marks)

    def restart(self, base: Mark) -> None:
        """Puts aside what cannot be gone on with; the next line follows the one that the registry knows as the last."""
        self._file.seek(0)
        if data := self._file.read():
            path = self.ledger.path
            aside = path.with_name(f"{path.name}.{hashlib.sha256(data).hexdigest()[:12]}")
            with aside.open("wb", buffering=0) as copy:
                _put(copy, data)
        self._file.truncate(0)
        self.ledger = Ledger(self.ledger.path, base, (), ())


@contextmanager
def opened(path: Path) -> Iterator[Book]:
    """Inside, nobody else writes. Waits for whoever does; a line that was never finished is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("ab+", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # ends with the process, however that ends
        if new:
            _sync_folder(path.parent)
        ledger = _read(path, file)
        if ledger.torn:
            file.truncate(os.fstat(file.fileno()).st_size - ledger.torn)
        yield Book(file, replace(ledger, torn=0))


def read(path: Path) -> Ledger:
    """As it is on the disk. A ledger that nobody has written to is empty."""
    if not path.exists():
        return Ledger(path, NONE, (), ())
    with path.open("rb", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        return _read(path, file)


def now() -> datetime:
    return datetime.now(UTC)


def account() -> str:
    """Whose account this process runs under."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, accounts may have no name
        return f"uid {os.getuid()}"


def _read(path: Path, file: FileIO) -> Ledger:
    file.seek(0)
    *lines, rest = (file.readall() or b"").split(b"\n")
    entries: list[Entry] = []
    marks: list[Mark] = []
    base, problem = NONE, ""
    for i, line in enumerate(lines):
        try:
            entry = json_records.decode(line, Entry, f"{path}, line {i + 1}")
        except DataError as e:
            problem = f"{e}: it was changed"
            break
        if i == 0 and entry.event == "adoption":
            base = Mark(entry.number - 1, entry.previous)
        before = marks[-1] if marks else base
        if (entry.number, entry.previous) != (before.number + 1, before.hash):
            problem = (
                f"{path}, line {i + 1}: does not follow the line before it; one of them was changed, or lines between "
                "them were removed"
            )
            break
        entries.append(entry)
        marks.append(_mark(entry.number, line))
    return Ledger(path, base, tuple(entries), tuple(marks), len(rest), problem)


def _mark(number: int, line: bytes) -> Mark:
    return Mark(number, hashlib.sha256(line).hexdigest())


def _put(file: FileIO, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]
    os.fsync(file)


def _sync_folder(folder: Path) -> None:
    """The file's name is on the disk as well."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

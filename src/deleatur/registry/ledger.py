"""The ledger: an append-only hash chain, one line of JSON per decision about a release.

    sed -n 3p ledger.jsonl | tr -d '\\n' | sha256sum     equals `previous` in line 4

One process at a time appends. A line counts once it is complete; a missing last newline is added by the next append. An
incomplete last line, which a killed process left, decided nothing, and is set aside in a file of its own. Nothing is
changed before something is appended. A chain cannot show that its last lines were removed or changed, so the registry
stores number and hash of the last line, see `Registry.ledger_position`.
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
from deleatur.storage import files, json_records

RECOVERY_HINT = "restore it from the backup or, if it is lost: deleatur settle --adopt --as NAME --reason WHY"

DecisionKind = Literal[
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
    """What a decision is about: a version, by the digests of what it consists of."""

    version: str | None
    """None: the verdict made no version."""
    weights: str
    """Digest of the delta."""
    evidence: str
    """Digest of the verdict, which holds the digests of its inputs."""
    files: str = ""
    """Digest of the statement of the version's files, see `signing`; empty: there is none."""


@dataclass(frozen=True)
class Entry:
    """One line of the ledger: a decision, and the aliases that follow from it."""

    number: int
    time: str
    """UTC, ISO 8601, to the second."""
    event: DecisionKind
    version: str | None
    actor: str
    """Name of the person who decided, as given. Of a registration: who started the run."""
    account: str
    """Account and host that wrote the line."""
    reason: str
    weights: str
    evidence: str
    files: str
    """Weights, evidence and files as in `Subject`."""
    aliases: Mapping[str, str]
    """Alias → version, for every alias that is set, changed by this line or not."""
    previous: str
    """SHA-256 of the previous line's bytes, without its newline."""


@dataclass(frozen=True)
class LedgerPosition:
    """A line of the ledger, by number and SHA-256."""

    number: int
    hash: str

    def __str__(self) -> str:
        return f"{self.number}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> LedgerPosition:
        number, _, digest = text.partition(":")
        return cls(int(number), digest)


GENESIS = LedgerPosition(0, "0" * 64)
"""Before the first line."""


@dataclass(frozen=True)
class Ledger:
    """The content of a ledger file."""

    path: Path
    start: LedgerPosition
    """Position before the first entry: GENESIS, or the last line of a ledger that was lost."""
    entries: tuple[Entry, ...]
    """Up to the first line that is invalid."""
    positions: tuple[LedgerPosition, ...]
    """Of each entry."""
    torn_bytes: int = 0
    """Length of an incomplete last line."""
    terminated: bool = True
    """Whether the last entry ends with a newline."""
    problem: str = ""
    """Where and how the chain is broken; empty: it is intact."""

    @property
    def head(self) -> LedgerPosition:
        return self.positions[-1] if self.positions else self.start

    @property
    def aliases(self) -> Mapping[str, str]:
        """Alias → version, by the last decision."""
        return self.entries[-1].aliases if self.entries else {}

    def require_intact(self) -> None:
        """Raises DataError if the chain is broken."""
        if self.problem:
            raise DataError(self.problem, hint=RECOVERY_HINT)

    def entries_after(self, position: LedgerPosition | None) -> tuple[Entry, ...]:
        """The entries behind the line that the registry last applied; position None: it has applied none.

        Raises DataError if that line is not in this ledger, or none is applied although each one is applied before
        the next is written.
        """
        if position is None and len(self.entries) > 1:
            raise DataError(
                f"the registry has applied none of the {len(self.entries)} lines of {self.path}: it was created anew, "
                "or this is the ledger of another registry",
                hint="deleatur restore FOLDER or, if it is lost: deleatur settle --adopt --as NAME --reason WHY",
            )
        if position in (None, self.start):
            return self.entries
        if position not in self.positions:
            missing = position.number > self.head.number
            actual = f"it ends with line {self.head.number}" if missing else "that line is another one"
            raise DataError(
                f"the registry has applied line {position.number} of {self.path}, {position.hash[:12]}…, and {actual}: "
                "lines were removed or changed, or this is the ledger of another registry",
                hint=RECOVERY_HINT,
            )
        return self.entries[self.positions.index(position) + 1 :]


class LedgerWriter:
    """The locked ledger of the one process that may append to it."""

    def __init__(self, file: FileIO, ledger: Ledger) -> None:
        self._file, self.ledger = file, ledger
        self._discarded = ledger.torn_bytes
        """Bytes at the end of the file to set aside before the next line is appended."""

    def append(
        self, event: DecisionKind, subject: Subject, actor: str, reason: str, aliases: Mapping[str, str]
    ) -> None:
        """Appends a line; it is on disk when this returns. Raises DataError if the chain is broken."""
        self.ledger.require_intact()
        head = self.ledger.head
        entry = Entry(
            number=head.number + 1,
            time=now().isoformat(timespec="seconds"),
            event=event,
            version=subject.version,
            actor=actor,
            account=f"{account()}@{gethostname()}",
            reason=reason,
            weights=subject.weights,
            evidence=subject.evidence,
            files=subject.files,
            aliases=dict(sorted(aliases.items())),
            previous=head.hash,
        )
        line = json.dumps(asdict(entry), ensure_ascii=False, separators=(",", ":")).encode()
        self._set_aside()
        with files.disk_errors(self.ledger.path):
            _write_all(self._file, (b"" if self.ledger.terminated else b"\n") + line + b"\n")
        entries, positions = (*self.ledger.entries, entry), (*self.ledger.positions, _position(entry.number, line))
        self.ledger = replace(self.ledger, entries=entries, positions=positions, torn_bytes=0, terminated=True)

    def restart(self, start: LedgerPosition) -> None:
        """Replaces a broken ledger, once something is appended: that line follows `start`."""
        self._discarded = os.fstat(self._file.fileno()).st_size
        self.ledger = Ledger(self.ledger.path, start, (), ())

    def _set_aside(self) -> None:
        """Moves what is discarded into a file beside the ledger, which is on disk before the ledger is truncated."""
        if not self._discarded:
            return
        end = os.fstat(self._file.fileno()).st_size - self._discarded  # of the part that stays
        self._file.seek(end)
        data, path = self._file.readall() or b"", self.ledger.path
        with path.with_name(f"{path.name}.{hashlib.sha256(data).hexdigest()[:12]}").open("wb", buffering=0) as copy:
            _write_all(copy, data)
        _sync_folder(path.parent)
        self._file.truncate(end)
        self._discarded = 0


@contextmanager
def locked(path: Path) -> Iterator[LedgerWriter]:
    """Locks the ledger for writing, once no other process does; changes nothing by itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _require_no_folder(path)
    new = not path.exists()
    with path.open("ab+", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the process ends, however it ends
        if new:
            _sync_folder(path.parent)
        yield LedgerWriter(file, _read(path, file))


def read(path: Path) -> Ledger:
    """The ledger as it is on disk; a missing file is an empty ledger."""
    if not path.exists():
        return Ledger(path, GENESIS, (), ())
    _require_no_folder(path)
    with path.open("rb", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        return _read(path, file)


def _require_no_folder(path: Path) -> None:
    if path.is_dir():
        raise DataError(
            f"expected the ledger's file, and {path} is a folder", hint=f"move it away; then {RECOVERY_HINT}"
        )


def now() -> datetime:
    return datetime.now(UTC)


def account() -> str:
    """Name of the account that this process runs under."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an account in a container may have no name
        return f"uid {os.getuid()}"


def _read(path: Path, file: FileIO) -> Ledger:
    file.seek(0)
    *lines, last = (file.readall() or b"").split(b"\n")
    entries: list[Entry] = []
    positions: list[LedgerPosition] = []
    start, problem, torn = GENESIS, "", 0
    for i, line in enumerate([*lines, last] if last else lines):
        try:
            entry = json_records.decode(line, Entry, f"{path}, line {i + 1}")
        except DataError as e:
            if i == len(lines) and not _complete(line):
                torn = len(line)
            else:
                problem = f"{e}: it was changed"
            break
        if i == 0 and entry.event == "adoption":
            start = LedgerPosition(entry.number - 1, entry.previous)
        previous = positions[-1] if positions else start
        if (entry.number, entry.previous) != (previous.number + 1, previous.hash):
            problem = (
                f"{path}, line {i + 1}: does not follow the line before it; one of them was changed, or lines between "
                "them were removed"
            )
            break
        entries.append(entry)
        positions.append(_position(entry.number, line))
    terminated = not last or bool(torn)
    return Ledger(path, start, tuple(entries), tuple(positions), torn, terminated, problem)


def _complete(line: bytes) -> bool:
    """Whether a line is complete: a truncated JSON object is not JSON."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _position(number: int, line: bytes) -> LedgerPosition:
    return LedgerPosition(number, hashlib.sha256(line).hexdigest())


def _write_all(file: FileIO, data: bytes) -> None:
    remaining = memoryview(data)
    while remaining:
        remaining = remaining[file.write(remaining) :]
    os.fsync(file)


def _sync_folder(folder: Path) -> None:
    """Flushes the folder, so that a new file's name is on disk as well."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""History of releases, consistency of ledger and registry, and how to settle differences. Loads no weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.registry import ledger
from deleatur.registry.decisions import (
    LockedRegistry,
    alias_mismatches,
    checked_ledger,
    locked_registry,
    open_registry,
    unchecked_registry,
)
from deleatur.registry.ledger import Entry, Ledger, Subject
from deleatur.registry.mlflow_registry import ALIASES, CHAMPION

SETTLE_HINT = "deleatur settle --as NAME --reason WHY"


@dataclass(frozen=True)
class History:
    """The ledger's entries, and whether ledger and registry are consistent."""

    entries: Sequence[Entry]
    table: Table
    problems: Sequence[DataError]
    """Inconsistencies, each with the command that resolves it."""
    torn_bytes: int
    """Length of a last line without a newline."""

    @property
    def summary(self) -> str:
        """One line of text: whether ledger and registry are consistent."""
        torn = f" A last line of {self.torn_bytes} bytes is incomplete: it decided nothing." if self.torn_bytes else ""
        if self.problems:
            return f"Not consistent.{torn}"
        return f"The chain is intact, {len(self.entries)} lines, and the registry's aliases match it.{torn}"

    @property
    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        problems = [{"message": str(p), "next_command": p.hint} for p in self.problems]
        return {
            "consistent": not self.problems,
            "problems": problems,
            "torn_bytes": self.torn_bytes,
            "entries": [asdict(e) for e in self.entries],
        }


def history(settings: Settings) -> History:
    """Reads ledger and registry; changes nothing."""
    recorded = ledger.read(settings.register_.ledger)
    return History(recorded.entries, _table(recorded), list(_problems(settings, recorded)), recorded.torn_bytes)


def _problems(settings: Settings, recorded: Ledger) -> Iterator[DataError]:
    if recorded.problem:
        yield DataError(recorded.problem, hint=ledger.RECOVERY_HINT)
        return
    try:
        registry = open_registry(settings, recorded)
        if not registry.exists:
            return  # nothing is decided yet; a query would make MLflow create its store
        pending = recorded.entries_after(registry.ledger_position())
    except DataError as e:
        yield e
        return
    if pending:
        lines = f"line {pending[0].number}" + (f" to {pending[-1].number}" if len(pending) > 1 else "")
        yield DataError(f"{lines}: decided, and the registry does not show it yet", hint=SETTLE_HINT)
        return
    for mismatch in alias_mismatches(recorded.aliases, registry.aliases()):
        yield DataError(f"moved by hand: {mismatch}", hint=SETTLE_HINT)


def consistent_ledger(settings: Settings) -> Ledger:
    """The ledger. Raises DataError if `history` reports a problem other than a decision that is pending."""
    recorded, registry = checked_ledger(settings), open_registry(settings)
    if recorded.entries or registry.exists:
        pending = recorded.entries_after(registry.ledger_position())
        for mismatch in [] if pending else alias_mismatches(recorded.aliases, registry.aliases()):
            raise DataError(f"moved by hand: {mismatch}", hint=SETTLE_HINT)
    return recorded


def settle(settings: Settings, actor: str, reason: str, *, adopt: bool = False) -> list[str]:
    """Resets the registry's aliases to those of the ledger, and returns what was inconsistent.

    adopt: takes the registry's aliases into the ledger instead. A ledger that was changed or lost restarts after the
    last line that the registry has applied; so does the ledger of a registry that was lost.
    """
    if not (actor.strip() and reason.strip()):
        raise DataError("a decision needs a name and a reason", hint=f"{SETTLE_HINT} {'--adopt' * adopt}".strip())
    if adopt:
        return _adopt(settings, actor, reason)
    with locked_registry(settings) as locked:
        if mismatches := locked.alias_mismatches():
            for version in {m.ledger for m in mismatches if m.ledger}:
                _require_unchanged(locked, version)
            locked.decide("settlement", _champion_subject(locked), actor, _reason_with(reason, *mismatches), {})
        return list(map(str, mismatches))


def _adopt(settings: Settings, actor: str, reason: str) -> list[str]:
    with ledger.locked(settings.register_.ledger) as writer:
        locked = LockedRegistry(writer, registry := unchecked_registry(settings))
        problems = []
        try:
            writer.ledger.require_intact()
            locked.apply_pending()
        except DataError as e:
            problems = [str(e)]
            writer.restart(registry.ledger_position() or ledger.GENESIS)
        findings = [*problems, *map(str, locked.alias_mismatches())]
        if findings:
            aliases = registry.aliases()
            moves = {name: aliases.get(name) for name in ALIASES}
            locked.decide("adoption", _champion_subject(locked), actor, _reason_with(reason, *findings), moves)
        return findings


def _require_unchanged(locked: LockedRegistry, version: str) -> None:
    """Raises DataError if a version that an alias would be put back to was deleted or changed."""
    try:
        locked.subject(version)
    except DataError as e:
        raise DataError(str(e), hint=f"deleatur restore FOLDER, or without this version: {SETTLE_HINT} --adopt") from e


def _champion_subject(locked: LockedRegistry) -> Subject:
    champion = locked.registry.alias(CHAMPION)
    return locked.subject(champion) if champion else Subject(None, "", "")


def _reason_with(reason: str, *findings: object) -> str:
    return f"{reason} ({'; '.join(map(str, findings))})"


def _table(recorded: Ledger) -> Table:
    table = Table(header_style="bold", box=None, padding=(0, 2, 0, 0))
    for name in ("line", "time, UTC", "event", "version", "champion"):
        table.add_column(name, no_wrap=True)
    for name in ("actor", "reason"):
        table.add_column(name, overflow="fold")
    for entry in recorded.entries:
        time, champion = entry.time[:16].replace("T", " "), entry.aliases.get(CHAMPION, "none")
        cells = (str(entry.number), time, entry.event, entry.version or "", champion, entry.actor, entry.reason)
        table.add_row(*map(Text, cells))  # as Text, not as markup: reasons are free text
    if recorded.start.number:
        table.caption = f"Lines 1 to {recorded.start.number} were lost; {recorded.path} continues behind them."
    return table

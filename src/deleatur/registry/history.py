"""Who released what, who took it back, and whether ledger and registry still say the same. Light: loads no weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.registry import ledger
from deleatur.registry.decisions import Moved, Release, in_hand, registry_of
from deleatur.registry.ledger import Entry, Subject
from deleatur.registry.mlflow_client import ALIASES, CHAMPION

PUT_RIGHT = "deleatur settle --as NAME --reason WHY"


@dataclass(frozen=True)
class History:
    entries: Sequence[Entry]
    table: Table
    problems: Sequence[DataError]
    """What is wrong, each with the command that puts it right."""
    torn: int
    """Bytes of a last line that was never finished."""

    @property
    def standing(self) -> str:
        """In a line, for people."""
        torn = f" A last line of {self.torn} bytes was never finished: nothing was decided by it." if self.torn else ""
        if self.problems:
            return f"Not in order.{torn}"
        return f"The chain is whole, {len(self.entries)} lines, and the registry's aliases are what it says.{torn}"

    @property
    def plain(self) -> dict[str, Any]:
        found = [{"problem": str(p), "next": p.hint} for p in self.problems]
        return {
            "whole": not self.problems,
            "problems": found,
            "torn": self.torn,
            "lines": [asdict(e) for e in self.entries],
        }


def history(settings: Settings) -> History:
    """Reads only."""
    known = ledger.read(settings.register_.ledger)
    return History(known.entries, _table(known), list(_problems(settings, known)), known.torn)


def _problems(settings: Settings, known: ledger.Ledger) -> Iterator[DataError]:
    if known.problem:
        yield DataError(known.problem, hint=ledger.ANEW)
        return
    registry = registry_of(settings)
    try:
        undone = known.after(registry.mark())
    except DataError as e:
        yield e
        return
    if undone:
        names = f"line {undone[0].number}" + (f" to {undone[-1].number}" if len(undone) > 1 else "")
        yield DataError(f"{names}: decided, and the registry does not show it yet", hint=PUT_RIGHT)
        return
    wanted, found = known.aliases, registry.aliases()
    for name in ALIASES:
        if wanted.get(name) != found.get(name):
            yield DataError(f"moved by hand: {Moved(name, wanted.get(name), found.get(name))}", hint=PUT_RIGHT)


def settle(settings: Settings, who: str, reason: str, *, adopt: bool = False) -> list[str]:
    """Puts the registry's aliases back to what the ledger says; what was wrong.

    adopt: the other way round, the ledger takes over what the registry says; one that was changed or lost is begun
    anew, behind the last line that the registry knows of.
    """
    if not (who.strip() and reason.strip()):
        raise DataError("a decision has a name and a reason to it", hint=f"{PUT_RIGHT} {'--adopt' * adopt}".strip())
    if adopt:
        return _adopt(settings, who, reason)
    with in_hand(settings) as release:
        if moved := release.moved():
            release.decide("settlement", _live(release), who, _with(reason, *moved), {})
        return list(map(str, moved))


def _adopt(settings: Settings, who: str, reason: str) -> list[str]:
    with ledger.opened(settings.register_.ledger) as book:
        release = Release(book, registry := registry_of(settings))
        lost = []
        try:
            book.ledger.demand_whole()
            release.carry_out()
        except DataError as e:
            lost = [str(e)]
            book.restart(registry.mark() or ledger.NONE)
        found = [*lost, *map(str, release.moved())]
        if found:
            aliases = registry.aliases()
            moves = {name: aliases.get(name) for name in ALIASES}
            release.decide("adoption", _live(release), who, _with(reason, *found), moves)
        return found


def _live(release: Release) -> Subject:
    live = release.registry.alias(CHAMPION)
    return release.subject(live) if live else Subject(None, "", "")


def _with(reason: str, *found: object) -> str:
    return f"{reason} ({'; '.join(map(str, found))})"


def _table(known: ledger.Ledger) -> Table:
    table = Table(header_style="bold", box=None, padding=(0, 2, 0, 0))
    for name in ("line", "when, UTC", "what", "version", "live"):
        table.add_column(name, no_wrap=True)
    for name in ("who", "why"):
        table.add_column(name, overflow="fold")
    for entry in known.entries:
        live = entry.aliases.get(CHAMPION, "none")
        # Not as markup: reasons are people's own words.
        cells = (
            str(entry.number),
            entry.time[:16].replace("T", " "),
            entry.event,
            entry.version or "",
            live,
            entry.who,
            entry.why,
        )
        table.add_row(*map(Text, cells))
    if known.base.number:
        table.caption = f"Lines 1 to {known.base.number} were lost; {known.path} goes on behind them."
    return table

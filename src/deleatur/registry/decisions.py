"""A decision about a version: a line of the ledger, then the registry's tags and aliases, then its mark of that line.

The line is the decision. Killed before it is whole, nothing was decided; killed after it, whoever has the ledger in
hand next carries it out first. Between the two the registry still shows what was live, whole. What is live changes in
one call. A mark that is the ledger's last line says that all is carried out: an alias that then says something else
was moved by hand. Light: loads no weights.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.records.report import Outcome
from deleatur.registry import ledger
from deleatur.registry.ledger import Book, Entry, Event, Ledger, Subject
from deleatur.registry.mlflow_client import ALIASES, CHALLENGER, CHAMPION, LAST, QUARANTINED, Registry
from deleatur.storage import dvc

STARTED_BY = "DELEATUR_STARTED_BY"
"""Environment variable with the name of who started the run, where that is known better than from git."""


@dataclass(frozen=True)
class Moved:
    """An alias that says something else than the ledger does."""

    alias: str
    ledger: str | None
    registry: str | None

    def __str__(self) -> str:
        wanted, found = (f"version {v}" if v else "no version" for v in (self.ledger, self.registry))
        return f"{self.alias} is {found}, and by the ledger {wanted}"


@dataclass(frozen=True)
class Release:
    """Ledger and registry in one hand."""

    book: Book
    registry: Registry

    @property
    def ledger(self) -> Ledger:
        return self.book.ledger

    def subject(self, version: str) -> Subject:
        """A version as the registry has it. Raises DataError where the ledger knows another one by this number."""
        tags = self.registry.tags(version)
        found = Subject(version, tags.get("delta", ""), tags.get("evidence", ""), tags.get("files", ""))
        for entry in self.ledger.entries:
            if entry.version == version and _subject(entry) != found:
                raise DataError(
                    f"version {version} of {self.registry.model} has other weights or other evidence than line "
                    f"{entry.number} of the ledger says: it was changed, or this is the ledger of another registry",
                    hint=ledger.ANEW,
                )
        return found

    def decide(self, event: Event, about: Subject, who: str, why: str, moves: Mapping[str, str | None]) -> None:
        """moves: the aliases that change, None for one that goes."""
        aliases = {name: version for name, version in {**self.ledger.aliases, **moves}.items() if version}
        self.book.append(event, about, who, why, aliases)
        self.carry_out()

    def carry_out(self) -> None:
        """What was decided and the registry does not show yet."""
        undone = self.ledger.after(self.registry.mark())
        if undone:
            for version in sorted(set(self.ledger.aliases.values())):
                self.subject(version)
            for entry in undone:
                _tag(self.registry, entry)
            self.registry.set_aliases(self.ledger.aliases)
            self.registry.set_mark(self.ledger.head)
        if self.ledger.entries and (last := self.ledger.entries[-1]).event == "approval":
            self.promote(_subject(last), last.who, last.why)

    def promote(self, about: Subject, who: str, why: str) -> None:
        """The version is live, and the one that was is the last known good."""
        moves: dict[str, str | None] = {CHAMPION: about.version, LAST: good(self.ledger.entries, but={about.version})}
        if self.ledger.aliases.get(CHALLENGER) == about.version:
            moves[CHALLENGER] = None
        self.decide("promotion", about, who, why, moves)

    def moved(self) -> list[Moved]:
        """Aliases that somebody moved by hand, once all that was decided is carried out."""
        wanted, found = self.ledger.aliases, self.registry.aliases()
        return [Moved(n, wanted.get(n), found.get(n)) for n in ALIASES if wanted.get(n) != found.get(n)]


def registry_of(settings: Settings) -> Registry:
    r = settings.register_
    return Registry(r.tracking_uri, r.experiment, r.model)


@contextmanager
def in_hand(settings: Settings) -> Iterator[Release]:
    """Inside, nobody else decides anything; what was decided before is carried out.

    Raises DataError where the ledger was changed, or is not this registry's.
    """
    with ledger.opened(settings.register_.ledger) as book:
        release = Release(book, registry_of(settings))
        book.ledger.demand_whole()
        if not book.ledger.entries and release.registry.mark() is None and (older := release.registry.aliases()):
            live = older.get(CHAMPION)
            about = release.subject(live) if live else Subject(None, "", "")
            release.decide("adoption", about, "deleatur", "the aliases are older than the ledger", older)
        release.carry_out()
        yield release


@contextmanager
def deciding(settings: Settings) -> Iterator[Release]:
    """As `in_hand`. Raises DataError also where somebody has moved an alias by hand: who decides now would build on
    what nobody has decided.
    """
    with in_hand(settings) as release:
        if moved := release.moved():
            raise DataError(
                f"somebody has moved aliases by hand: {'; '.join(map(str, moved))}",
                hint="deleatur settle --as NAME --reason WHY (puts them back; with --adopt, puts them into the ledger)",
            )
        yield release


def enter(settings: Settings, about: Subject, outcome: Outcome, headline: str, beyond: str = "") -> str:
    """Registers a verdict. On a pass its version waits for a person or, where the policy asks nobody, is live.

    Another version that waits, or the same weights, are void from then on. Entered again, the same verdict changes
    nothing, unless its version has waited too long or was void. What came of it, in words. beyond: why a pass has no
    version.
    """
    version, who = about.version, person()
    with deciding(settings) as release:
        if (waits := release.ledger.aliases.get(CHALLENGER)) == version and waits:
            expire(settings, release, waits, who)
        known = [e for e in release.ledger.entries if e.evidence == about.evidence]
        if not known or known[-1].event in ("expiry", "voiding"):
            _void(release, about, who)
            release.decide("registration", about, who, headline, {CHALLENGER: version} if version else {})
        if version is None:
            if outcome == "pass":
                # Whoever loads a version draws plainly, and would get what nobody has judged.
                return f"pass, with {beyond}, which a version cannot hold: what is live stays"
            return f"verdict {outcome}: no version made, what is live stays"
        if release.ledger.aliases.get(CHALLENGER) != version:
            return f"version {version} was decided about already: deleatur history"
        entries = release.ledger.entries
        if bad := {e.version for e in entries if e.weights == about.weights} & {*quarantined(entries)}:
            return f"version {version} is challenger: its weights are quarantined as version {bad.pop()}"
        if settings.register_.approval:
            return f"version {version} is challenger"
        if why := hesitation(settings, release, version):
            return f"version {version} is challenger: {why}"
        release.promote(about, who, "a pass, and the policy asks nobody")
        return f"version {version} is champion"


def hesitation(settings: Settings, release: Release, version: str) -> str:
    """Why a pass does not replace what is live before a person has said so; empty: it does."""
    live = release.ledger.aliases.get(CHAMPION)
    if live in (None, version):
        return ""
    own, its = release.registry.tags(version), release.registry.tags(str(live))
    if lost := {*its.get("concepts", "").split("+")} - {*own.get("concepts", "").split("+"), ""}:
        return f"{', '.join(sorted(lost))} would be back, which version {live} has erased; name all of them in targets"
    address = f"models:/{settings.register_.model}/{live}"
    if any("champion" in rule.sides for rule in settings.gate.rules.values()) and own.get("champion") != address:
        return f"the policy compares with what is live, and it was not; name sample.champion: {address} in params.yaml"
    return ""


def expire(settings: Settings, release: Release, version: str, who: str) -> bool:
    """Whether the challenger has waited too long; it does not wait any longer then."""
    days = settings.register_.approval_days
    since = registration(release.ledger.entries, version).time
    if ledger.now() - datetime.fromisoformat(since) <= timedelta(days=days):
        return False
    why = f"waited since {since[:10]}, and approvals are for {days} days"
    release.decide("expiry", release.subject(version), who, why, {CHALLENGER: None})
    return True


def _void(release: Release, about: Subject, who: str) -> None:
    waits = release.ledger.aliases.get(CHALLENGER)
    if waits is None:
        return
    old = release.subject(waits)
    if about.version or old.weights == about.weights:
        instead = f"version {about.version} was made since" if about.version else "the same weights were judged anew"
        release.decide("voiding", old, who, instead, {CHALLENGER: None})


def registration(entries: Sequence[Entry], version: str) -> Entry:
    """The line by which a version came to wait; of one that is older than the ledger, the one that took it over."""
    own = [e for e in entries if e.event == "registration" and e.version == version]
    return (own or [e for e in entries if e.event == "adoption" and version in e.aliases.values()])[-1]


def quarantined(entries: Sequence[Entry]) -> dict[str, str]:
    """Version → why it must not be used."""
    found: dict[str, str] = {}
    for entry in entries:
        if version := entry.aliases.get(QUARANTINED):
            found.setdefault(version, entry.why)
    return found


def good(entries: Sequence[Entry], but: Collection[str | None]) -> str | None:
    """The version that was live last, quarantined ones and those of `but` aside."""
    bad = {*but, *quarantined(entries)}
    return next((v for e in reversed(entries) if (v := e.aliases.get(CHAMPION)) and v not in bad), None)


def person() -> str:
    """Who started this run: whoever a scheduler names, or git's user, or the account."""
    return os.environ.get(STARTED_BY) or dvc.author(Path()) or ledger.account()


def _subject(entry: Entry) -> Subject:
    return Subject(entry.version, entry.weights, entry.evidence, entry.files)


def _tag(registry: Registry, entry: Entry) -> None:
    """What a version says of itself for good, to whoever looks at it in MLflow."""
    version, said = entry.version, {}
    match entry.event:
        case "registration":
            said = {"started_by": entry.who}
        case "approval":
            said = {"approved_by": entry.who, "approved_because": entry.why}
            said |= {"approved_evidence": entry.evidence, "approved_delta": entry.weights}
        case "decline":
            said = {"declined_by": entry.who, "declined_because": entry.why}
        case "rollback" | "quarantine":
            version = entry.aliases[QUARANTINED]
            said = {"quarantined_by": entry.who, "quarantined_because": entry.why}
    if version and said:
        registry.tag(version, said)

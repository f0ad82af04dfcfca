"""Decisions about versions: a line of the ledger, then the registry's pages and aliases, then its ledger position.

The line is the decision. A process that is killed before the line is complete has decided nothing; if it is killed
afterwards, the next process that locks the ledger applies the line first. In between, the registry still shows the
previous champion: the champion changes in one call. Once the registry's ledger position is the ledger's last line,
everything is applied, and an alias that differs was moved by hand. Loads no weights.
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
from deleatur.registry import descriptions, ledger
from deleatur.registry.ledger import DecisionKind, Entry, Ledger, LedgerWriter, Subject
from deleatur.registry.mlflow_registry import ALIASES, CHALLENGER, CHAMPION, LAST_KNOWN_GOOD, QUARANTINED, Registry
from deleatur.storage import git

STARTED_BY = "DELEATUR_STARTED_BY"
"""Environment variable: name of the person who started the run; takes precedence over git's user."""

WITHOUT_LEDGER = "DELEATUR_WITHOUT_LEDGER"
"""Environment variable, set in processes on workers, which have no ledger: versions are then compared with the registry
alone."""


@dataclass(frozen=True)
class AliasMismatch:
    """An alias whose version in the registry is not the one that the ledger has."""

    alias: str
    ledger: str | None
    registry: str | None

    def __str__(self) -> str:
        decided, registered = (f"version {v}" if v else "no version" for v in (self.ledger, self.registry))
        return f"{self.alias} is {registered}, and by the ledger {decided}"


@dataclass(frozen=True)
class LockedRegistry:
    """The registry, and its ledger locked for writing."""

    writer: LedgerWriter
    registry: Registry

    @property
    def ledger(self) -> Ledger:
        return self.writer.ledger

    def subject(self, version: str) -> Subject:
        """A version's digests in the registry. Raises DataError if they are not those in the ledger."""
        tags = self.registry.tags(version)
        registered = Subject(version, tags.get("delta", ""), tags.get("evidence", ""), tags.get("files", ""))
        for entry in self.ledger.entries:
            if entry.version == version and _subject_of(entry) != registered:
                raise DataError(
                    f"version {version} of {self.registry.model} has other weights or other evidence than line "
                    f"{entry.number} of the ledger says: it was changed, or this is the ledger of another registry",
                    hint=f"deleatur verify {version}; where it was changed: "
                    f"deleatur quarantine {version} --as NAME --reason WHY",
                )
        return registered

    def recorded_subject(self, version: str) -> Subject:
        """A version's digests by the ledger, whatever happened to the version since; by the registry before the
        ledger's first entry about it.
        """
        recorded = [e for e in self.ledger.entries if e.version == version]
        return _subject_of(recorded[-1]) if recorded else self.subject(version)

    def decide(
        self, event: DecisionKind, subject: Subject, actor: str, reason: str, moves: Mapping[str, str | None]
    ) -> None:
        """Appends a decision and applies it. moves: the aliases that change; None removes one.

        Raises DataError, before anything is recorded, if a version that would go live or wait for approval was changed.
        A version that leaves is not compared: that it was changed is a reason to quarantine it.
        """
        for version in {moves.get(CHAMPION), moves.get(CHALLENGER)} - {None}:
            self.subject(str(version))
        aliases = {name: version for name, version in {**self.ledger.aliases, **moves}.items() if version}
        self.writer.append(event, subject, actor, reason, aliases)
        self.apply_pending()

    def apply_pending(self) -> None:
        """Applies the decisions that the registry does not show yet, and promotes a version that was approved.

        A version that was deleted from the registry stays without alias and description: `history` names the alias.
        """
        if pending := self.ledger.entries_after(self.registry.ledger_position()):
            apply_state(self.registry, self.ledger, pending)
        if self.ledger.entries and (last := self.ledger.entries[-1]).event == "approval":
            self.promote(_subject_of(last), last.actor, last.reason)

    def promote(self, subject: Subject, actor: str, reason: str) -> None:
        """Makes a version champion, and the previous champion the last known good version."""
        moves: dict[str, str | None] = {
            CHAMPION: subject.version,
            LAST_KNOWN_GOOD: last_good_version(self.ledger.entries, exclude={subject.version}),
        }
        if self.ledger.aliases.get(CHALLENGER) == subject.version:
            moves[CHALLENGER] = None
        self.decide("promotion", subject, actor, reason, moves)

    def alias_mismatches(self) -> list[AliasMismatch]:
        """Aliases that were moved by hand, provided that every decision is applied."""
        return alias_mismatches(self.ledger.aliases, self.registry.aliases())


def alias_mismatches(decided: Mapping[str, str], registered: Mapping[str, str]) -> list[AliasMismatch]:
    """The aliases that differ. decided, registered: alias → version, in the ledger and in the registry."""
    pairs = ((name, decided.get(name), registered.get(name)) for name in ALIASES)
    return [AliasMismatch(*pair) for pair in pairs if pair[1] != pair[2]]


def open_registry(settings: Settings, recorded: Ledger | None = None) -> Registry:
    """The registry. Raises DataError if its file is missing although the ledger has decisions: a query would make
    MLflow create an empty one.

    recorded: the ledger, read from disk by default. A process that has locked it must pass it: reading waits for the
    lock.
    """
    registry = unchecked_registry(settings)
    if not (registry.exists or os.environ.get(WITHOUT_LEDGER)):
        recorded = recorded or ledger.read(settings.register_.ledger)
        if recorded.entries:
            raise DataError(
                f"{registry.shown_uri} is missing, and {recorded.path} has {recorded.head.number} decisions about its "
                "versions: missing is not empty",
                hint="put it back, or correct register.tracking_uri in params.yaml, or: deleatur restore FOLDER; where "
                "it is lost: deleatur settle --adopt --as NAME --reason WHY",
            )
    return registry


def unchecked_registry(settings: Settings) -> Registry:
    """The registry, which may be about to be created."""
    section = settings.register_
    return Registry(section.tracking_uri, section.experiment, section.model)


def checked_ledger(settings: Settings) -> Ledger:
    """The ledger, compared with the registry. Raises DataError if it was changed or lost, or is another registry's.

    If neither exists, the registry is not queried: MLflow would create its store. On a worker, the ledger is empty.
    """
    recorded = ledger.read(settings.register_.ledger)
    recorded.require_intact()
    registry = open_registry(settings, recorded)
    if recorded.entries or (registry.exists and not os.environ.get(WITHOUT_LEDGER)):
        recorded.entries_after(registry.ledger_position())
    return recorded


@contextmanager
def without_ledger() -> Iterator[None]:
    """Inside, this process works without a ledger, as on a worker; see WITHOUT_LEDGER."""
    before = os.environ.get(WITHOUT_LEDGER)
    os.environ[WITHOUT_LEDGER] = "true"
    try:
        yield
    finally:
        os.environ.pop(WITHOUT_LEDGER)
        os.environ.update({WITHOUT_LEDGER: before} if before else {})


@contextmanager
def locked_registry(settings: Settings) -> Iterator[LockedRegistry]:
    """Locks the ledger, and applies the decisions that are pending.

    Raises DataError if the ledger was changed, or belongs to another registry.
    """
    with ledger.locked(settings.register_.ledger) as writer:
        writer.ledger.require_intact()
        locked = LockedRegistry(writer, open_registry(settings, writer.ledger))
        if not writer.ledger.entries and locked.registry.ledger_position() is None:
            _adopt_existing_aliases(locked)
        locked.apply_pending()
        yield locked


def _adopt_existing_aliases(locked: LockedRegistry) -> None:
    """Begins the ledger of a registry that is older than the ledger."""
    if existing := locked.registry.aliases():
        champion = existing.get(CHAMPION)
        subject = locked.subject(champion) if champion else Subject(None, "", "")
        locked.decide("adoption", subject, "deleatur", "the aliases are older than the ledger", existing)


@contextmanager
def locked_for_decision(settings: Settings) -> Iterator[LockedRegistry]:
    """As `locked_registry`. Also raises DataError where an alias was moved by hand: a new decision would be based on
    a state that was never decided.
    """
    with locked_registry(settings) as locked:
        if mismatches := locked.alias_mismatches():
            raise DataError(
                f"aliases were moved by hand: {'; '.join(map(str, mismatches))}",
                hint="deleatur settle --as NAME --reason WHY (puts them back; with --adopt, puts them into the ledger)",
            )
        yield locked


def record_verdict(
    settings: Settings, subject: Subject, outcome: Outcome, headline: str, unreleasable: str = ""
) -> str:
    """Enters a verdict into the ledger, and returns a message with the result.

    On a pass its version becomes challenger and, unless a person has to approve it, champion. A previous challenger, or
    one of the same weights, is voided. Entering the same verdict again changes nothing, unless its version has expired
    or was voided. unreleasable: why a pass has no version.
    """
    version, actor = subject.version, started_by()
    with locked_for_decision(settings) as locked:
        if (challenger := locked.ledger.aliases.get(CHALLENGER)) == version and challenger:
            expire_challenger(settings, locked, challenger, actor)
        recorded = [e for e in locked.ledger.entries if e.evidence == subject.evidence]
        if not recorded or recorded[-1].event in ("expiry", "voiding"):
            _void_challenger(locked, subject, actor)
            locked.decide("registration", subject, actor, headline, {CHALLENGER: version} if version else {})
        if version is None:
            if outcome == "pass":
                # A version is sampled without the guide: that is not what was evaluated.
                return f"pass, with {unreleasable}, which a version cannot hold: the champion stays"
            return f"verdict {outcome}: no version made, the champion stays"
        if locked.ledger.aliases.get(CHALLENGER) != version:
            return f"version {version} was decided about already: deleatur history"
        entries = locked.ledger.entries
        same_weights = {e.version for e in entries if e.weights == subject.weights}
        if quarantined_twins := same_weights & {*quarantine_reasons(entries)}:
            return f"version {version} is challenger: its weights are quarantined as version {quarantined_twins.pop()}"
        if settings.register_.approval:
            return f"version {version} is challenger"
        if reason := approval_required_reason(settings, locked, version):
            return f"version {version} is challenger: {reason}"
        locked.promote(subject, actor, "a pass, and the policy asks for no approval")
        return f"version {version} is champion"


def approval_required_reason(settings: Settings, locked: LockedRegistry, version: str) -> str:
    """Why a version that passed needs a person's approval all the same; empty: it needs none."""
    champion = locked.ledger.aliases.get(CHAMPION)
    if champion in (None, version):
        return ""
    tags, champion_tags = locked.registry.tags(version), locked.registry.tags(str(champion))
    if lost := {*champion_tags.get("concepts", "").split("+")} - {*tags.get("concepts", "").split("+"), ""}:
        names = ", ".join(sorted(lost))
        return f"{names} would be back, which version {champion} has erased; name all of them in targets"
    address = f"models:/{settings.register_.model}/{champion}"
    if any("champion" in rule.variants for rule in settings.gate.rules.values()) and tags.get("champion") != address:
        return (
            "the policy compares with the champion, and it was not compared with; set sample.champion: "
            f"{address} in params.yaml"
        )
    return ""


def expire_challenger(settings: Settings, locked: LockedRegistry, version: str, actor: str) -> bool:
    """Ends the wait of a challenger that has waited too long, and returns whether it has."""
    days = settings.register_.approval_days
    since = registration_entry(locked.ledger.entries, version).time
    if ledger.now() - datetime.fromisoformat(since) <= timedelta(days=days):
        return False
    reason = f"waited since {since[:10]}, and approvals expire after {days} days"
    locked.decide("expiry", locked.subject(version), actor, reason, {CHALLENGER: None})
    return True


def _void_challenger(locked: LockedRegistry, subject: Subject, actor: str) -> None:
    challenger = locked.ledger.aliases.get(CHALLENGER)
    if challenger is None:
        return
    voided = locked.subject(challenger)
    if subject.version or voided.weights == subject.weights:
        newer = f"version {subject.version} was made since"
        reason = newer if subject.version else "the same weights were evaluated again"
        locked.decide("voiding", voided, actor, reason, {CHALLENGER: None})


def registration_entry(entries: Sequence[Entry], version: str) -> Entry:
    """The entry that made a version challenger; for a version that is older than the ledger, its adoption."""
    registrations = [e for e in entries if e.event == "registration" and e.version == version]
    return (registrations or [e for e in entries if e.event == "adoption" and version in e.aliases.values()])[-1]


def quarantine_reasons(entries: Sequence[Entry]) -> dict[str, str]:
    """Version → why it was quarantined."""
    reasons: dict[str, str] = {}
    for entry in entries:
        if version := entry.aliases.get(QUARANTINED):
            reasons.setdefault(version, entry.reason)
    return reasons


def last_good_version(entries: Sequence[Entry], exclude: Collection[str | None]) -> str | None:
    """The most recent champion that is neither quarantined nor in `exclude`."""
    excluded = {*exclude, *quarantine_reasons(entries)}
    return next((v for e in reversed(entries) if (v := e.aliases.get(CHAMPION)) and v not in excluded), None)


def started_by() -> str:
    """Who started this run: the name in the environment, git's user, or the account."""
    return os.environ.get(STARTED_BY) or git.user_name(Path()) or ledger.account()


def _subject_of(entry: Entry) -> Subject:
    return Subject(entry.version, entry.weights, entry.evidence, entry.files)


def _describe_decision(registry: Registry, entry: Entry, existing: Collection[str]) -> None:
    """Adds a decision to the descriptions and tags of its versions, for readers of MLflow's pages."""
    for version, line in descriptions.decision_lines(entry).items():
        if version in existing:
            registry.describe(descriptions.with_decision(registry.description(version), line), version)
    quarantined = entry.aliases.get(QUARANTINED)
    if entry.event in ("rollback", "quarantine") and quarantined and quarantined in existing:
        registry.mark_quarantined(quarantined, entry.reason)


def apply_state(registry: Registry, recorded: Ledger, pending: Sequence[Entry] = ()) -> None:
    """Describes pending decisions, sets the registry's aliases and description to those of the ledger, and last its
    ledger position: from then on, every decision counts as applied. A version that was deleted from the registry gets
    no alias and no description.
    """
    existing = {str(v.version) for v in registry.versions()}
    for entry in pending:
        _describe_decision(registry, entry, existing)
    registry.set_aliases({name: version for name, version in recorded.aliases.items() if version in existing})
    registry.describe(descriptions.model_description(registry.model, recorded))
    registry.set_ledger_position(recorded.head)

"""A person's decision about a challenger: approve it, or decline it. Loads no weights."""

from __future__ import annotations

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.records.report import Verdict
from deleatur.registry.decisions import (
    LockedRegistry,
    expire_challenger,
    locked_for_decision,
    open_registry,
    registration_entry,
)
from deleatur.registry.ledger import DecisionKind, Subject
from deleatur.registry.mlflow_registry import CHALLENGER, CHAMPION, Registry
from deleatur.registry.verify import verify
from deleatur.storage import json_records


def pending_approval(settings: Settings) -> tuple[str, str] | None:
    """(version, digest of its evidence) of this workspace's verdict, if that version is challenger."""
    registry = open_registry(settings)
    evidence = json_records.digest(json_records.read(settings.paths.verdict / "verdict.json", Verdict))
    version = registry.version(evidence)
    return (version, evidence) if version and registry.alias(CHALLENGER) == version else None


def promote(settings: Settings, version: str, approver: str, *, reason: str = "", evidence: str | None = None) -> str:
    """Makes the challenger champion, and records who approved it, why, and on which evidence, whose digest it returns.

    evidence: the digest that the approver was shown; if given, it has to be the version's. Raises DataError if the
    version is not challenger, has waited too long, or comes from a run that the approver started; ModelError if its
    files are not those that were evaluated. Idempotent.
    """
    _require_same_evidence(open_registry(settings), version, approver, evidence)
    with locked_for_decision(settings) as locked:
        is_champion = locked.ledger.aliases.get(CHAMPION) == version
        if not (is_champion and _has_event(locked, version, "approval")):
            subject = _challenger_subject(locked, version)
            _require_second_person(locked, version, approver)
            if expire_challenger(settings, locked, version, approver):
                raise DataError(
                    f"version {version} {locked.ledger.entries[-1].reason}: it has to be evaluated again",
                    hint="deleatur demo (brings everything up to date and registers it), then approve it",
                )
            verify(settings, version, locked.ledger.entries, fetch=False)
            locked.decide("approval", subject, approver, reason, {})  # the promotion follows from it
        return locked.subject(version).evidence


def decline(settings: Settings, version: str, approver: str, *, reason: str = "", evidence: str | None = None) -> None:
    """Removes a challenger, and records who declined it and why; the champion stays.

    Raises DataError if the version is not challenger. Idempotent.
    """
    _require_same_evidence(open_registry(settings), version, approver, evidence)
    with locked_for_decision(settings) as locked:
        if not _has_event(locked, version, "decline"):
            locked.decide("decline", _challenger_subject(locked, version), approver, reason, {CHALLENGER: None})


def _require_same_evidence(registry: Registry, version: str, approver: str, evidence: str | None) -> None:
    """Raises DataError if the version is not the one that the approver was shown."""
    if not approver.strip():
        raise DataError("a decision needs a name, and none was given", hint=f"deleatur approve {version} --as NAME")
    if evidence not in (None, registry.tags(version).get("evidence")):
        raise DataError(f"version {version} rests on evidence other than what was shown", hint="decide again")


def _require_second_person(locked: LockedRegistry, version: str, approver: str) -> None:
    starter = registration_entry(locked.ledger.entries, version).actor
    if _normalized_name(approver) == _normalized_name(starter):
        raise DataError(
            f"{starter} has started the run that made version {version}: another person has to approve it",
            hint=f"deleatur approve {version} --as NAME, by another person",
        )


def _normalized_name(person: str) -> str:
    """Ada Lovelace <ada@example.org> and ada  lovelace → ada lovelace."""
    return " ".join(person.partition("<")[0].casefold().split())


def _has_event(locked: LockedRegistry, version: str, event: DecisionKind) -> bool:
    return any(e.event == event and e.version == version for e in locked.ledger.entries)


def _challenger_subject(locked: LockedRegistry, version: str) -> Subject:
    if (challenger := locked.ledger.aliases.get(CHALLENGER)) != version:
        instead = f"version {challenger} does" if challenger else "none does"
        raise DataError(
            f"version {version} of {locked.registry.model} does not wait for a decision; {instead}",
            hint=f"deleatur approve {challenger} --as NAME (or decline)" if challenger else "deleatur history",
        )
    return locked.subject(version)

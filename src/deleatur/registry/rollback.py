"""Rollback: an earlier version becomes champion again, and the previous champion is quarantined.

Loads no network and needs no GPU. A quarantined version never goes live again. Its weights may, as another version,
after another verdict and a person's approval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from deleatur.config.settings import Settings
from deleatur.errors import DataError, ModelError
from deleatur.registry.decisions import LockedRegistry, last_good_version, locked_for_decision, quarantine_reasons
from deleatur.registry.ledger import Entry
from deleatur.registry.mlflow_registry import CHALLENGER, CHAMPION, LAST_KNOWN_GOOD, QUARANTINED
from deleatur.registry.verify import verify


@dataclass(frozen=True)
class RollbackResult:
    """The versions that a rollback or quarantine leaves."""

    quarantined: str | None
    """None where nothing was live: a version became champion in no other's place."""
    champion: str | None
    """The champion from now on, if there is one."""
    already: bool
    """Whether an earlier command had already quarantined it."""


def rollback(settings: Settings, actor: str, reason: str, to: str | None = None) -> RollbackResult:
    """Rolls back to the last known good version, or to version `to`, which is required where nothing is live.

    Idempotent: called again without `to`, it changes nothing. Raises DataError if there is no earlier version, or
    the version may not go live; ModelError if its files are not those that were evaluated.
    """
    _require_actor_and_reason(actor, reason)
    with locked_for_decision(settings) as locked:
        aliases = locked.ledger.aliases
        champion, last_change = aliases.get(CHAMPION), _last_champion_change(locked.ledger.entries)
        if last_change and last_change.event in ("rollback", "quarantine") and to in (None, champion):
            replaced = QUARANTINED in last_change.aliases
            return RollbackResult(last_change.aliases.get(QUARANTINED), champion, already=replaced)
        if champion is None and to is None:
            good = aliases.get(LAST_KNOWN_GOOD)
            raise DataError(
                "nothing is live that could be rolled back"
                + (f"; version {good} is the last known good one, and --to {good} makes it live" if good else ""),
                hint=f"deleatur rollback --to {good} --as NAME --reason WHY" if good else "deleatur history",
            )
        target = to or aliases.get(LAST_KNOWN_GOOD)
        if target is None:
            raise DataError(
                f"version {champion} is the first that was ever live: there is none to roll back to",
                hint=f"deleatur quarantine {champion} --as NAME --reason WHY (then nothing is live)",
            )
        _require_releasable(settings, locked, target)
        moves = {  # without a champion, nothing is quarantined
            QUARANTINED: champion,
            CHAMPION: target,
            LAST_KNOWN_GOOD: last_good_version(locked.ledger.entries, exclude={champion, target}),
        }
        locked.decide("rollback", locked.subject(target), actor, reason, moves)
        return RollbackResult(champion, target, already=False)


def quarantine(settings: Settings, version: str, actor: str, reason: str) -> RollbackResult:
    """Quarantines a version. If it is champion, the last known good version replaces it, or none if that one may not go
    live or its files are not those that were evaluated. Raises DataError if there is no such version.
    """
    _require_actor_and_reason(actor, reason)
    with locked_for_decision(settings) as locked:
        subject, aliases = locked.recorded_subject(version), locked.ledger.aliases
        if version in quarantine_reasons(locked.ledger.entries):
            return RollbackResult(version, aliases.get(CHAMPION), already=True)
        champion, excluded = aliases.get(CHAMPION), {version}
        if champion == version and (champion := aliases.get(LAST_KNOWN_GOOD)):
            try:
                _require_releasable(settings, locked, champion)
            except (DataError, ModelError) as e:
                reason, excluded, champion = f"{reason} (and nothing instead: {e})", {version, champion}, None
        moves = {
            QUARANTINED: version,
            CHAMPION: champion,
            LAST_KNOWN_GOOD: last_good_version(locked.ledger.entries, exclude={*excluded, champion}),
        }
        if aliases.get(CHALLENGER) == version:
            moves[CHALLENGER] = None
        locked.decide("quarantine", subject, actor, reason, moves)
        return RollbackResult(version, champion, already=False)


def _last_champion_change(entries: Sequence[Entry]) -> Entry | None:
    """The decision that made the current champion champion, or removed the last one."""
    champions = [None, *(e.aliases.get(CHAMPION) for e in entries)]
    changes = [e for e, (before, after) in zip(entries, pairwise(champions), strict=True) if before != after]
    return changes[-1] if changes else None


def _require_actor_and_reason(actor: str, reason: str) -> None:
    if not (actor.strip() and reason.strip()):
        raise DataError(
            "a rollback or quarantine needs a name and a reason", hint="the same command with --as NAME --reason WHY"
        )


def _require_releasable(settings: Settings, locked: LockedRegistry, version: str) -> None:
    """Raises DataError for a version that has not passed, is quarantined, or lacks a person's approval."""
    refusal = ""
    events = [e.event for e in locked.ledger.entries if e.version == version]
    if version == locked.ledger.aliases.get(CHAMPION):
        refusal = "is live"
    elif version in (reasons := quarantine_reasons(locked.ledger.entries)):
        refusal = f"is quarantined: {reasons[version]}"
    elif (tags := locked.registry.tags(version)).get("outcome") != "pass":
        refusal = "has not passed"
    elif "quarantined_because" in tags:  # decided in a ledger that was lost
        refusal = f"is quarantined: {tags['quarantined_because']}"
    elif "decline" in events:
        refusal = "was declined"
    elif settings.register_.approval and not {"promotion", "adoption", "rollback"} & set(events):
        refusal = "was never live, and the policy asks for a person's approval first"
    if refusal:
        raise DataError(f"version {version} {refusal}", hint="deleatur history")
    verify(settings, version, locked.ledger.entries, fetch=False)

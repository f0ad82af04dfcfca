"""Taking a release back: the version before it is live again, and the one that was is quarantined.

No network is loaded and no GPU is needed. A quarantined version never goes live again: its weights may, as another
version, on another verdict and a person's word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from deleatur.config.settings import Settings
from deleatur.errors import DataError, ModelError
from deleatur.registry.decisions import Release, deciding, good, quarantined
from deleatur.registry.ledger import Entry
from deleatur.registry.mlflow_client import CHALLENGER, CHAMPION, LAST, QUARANTINED
from deleatur.registry.verify import verify


@dataclass(frozen=True)
class TakenBack:
    left: str
    """The version that is quarantined now."""
    live: str | None
    """The champion, if there is one."""
    already: bool
    """Whether it had been done before."""


def rollback(settings: Settings, who: str, reason: str, to: str | None = None) -> TakenBack:
    """Takes the last release back: to the last known good version, or to the one named.

    A release is taken back once: asked again, this changes nothing, and to go further back wants a version named.
    Raises DataError where there is nothing to go back to, or the version may not be live; ModelError where its files
    are not those that were judged.
    """
    _demand(who, reason)
    with deciding(settings) as release:
        aliases = release.ledger.aliases
        live, turn = aliases.get(CHAMPION), _turn(release.ledger.entries)
        if turn and turn.event in ("rollback", "quarantine") and to in (None, live):
            return TakenBack(turn.aliases[QUARANTINED], live, already=True)
        if live is None:
            raise DataError("nothing is live that could be taken back", hint="deleatur history")
        back_to = to or aliases.get(LAST)
        if back_to is None:
            raise DataError(
                f"version {live} is the first that was ever live: there is none to go back to",
                hint=f"deleatur quarantine {live} --as NAME --reason WHY (then nothing is live)",
            )
        _may_be_live(settings, release, back_to)
        moves = {QUARANTINED: live, CHAMPION: back_to, LAST: good(release.ledger.entries, but={live, back_to})}
        release.decide("rollback", release.subject(back_to), who, reason, moves)
        return TakenBack(live, back_to, already=False)


def quarantine(settings: Settings, version: str, who: str, reason: str) -> TakenBack:
    """The version must not be used any more. If it is live, the last known good one is instead, or none: also where
    the files of that one are not those that were judged.
    """
    _demand(who, reason)
    with deciding(settings) as release:
        about, aliases = release.subject(version), release.ledger.aliases
        if version in quarantined(release.ledger.entries):
            return TakenBack(version, aliases.get(CHAMPION), already=True)
        live, bad = aliases.get(CHAMPION), {version}
        if live == version and (live := aliases.get(LAST)):
            try:
                _may_be_live(settings, release, live)
            except (DataError, ModelError) as e:
                reason, bad, live = f"{reason} (and nothing instead: {e})", {version, live}, None
        moves = {QUARANTINED: version, CHAMPION: live, LAST: good(release.ledger.entries, but={*bad, live})}
        if aliases.get(CHALLENGER) == version:
            moves[CHALLENGER] = None
        release.decide("quarantine", about, who, reason, moves)
        return TakenBack(version, live, already=False)


def _turn(entries: Sequence[Entry]) -> Entry | None:
    """The decision by which what is live is live."""
    live = [None, *(e.aliases.get(CHAMPION) for e in entries)]
    return next((e for e, (a, b) in zip(reversed(entries), reversed([*pairwise(live)]), strict=True) if a != b), None)


def _demand(who: str, reason: str) -> None:
    if not (who.strip() and reason.strip()):
        raise DataError(
            "who takes a release back says who it is, and why", hint="the same command with --as NAME --reason WHY"
        )


def _may_be_live(settings: Settings, release: Release, version: str) -> None:
    """Raises DataError for a version that has not passed, is quarantined, or has not been through a person's hands."""
    why = ""
    about = [e.event for e in release.ledger.entries if e.version == version]
    if version == release.ledger.aliases.get(CHAMPION):
        why = "is live"
    elif version in (bad := quarantined(release.ledger.entries)):
        why = f"is quarantined: {bad[version]}"
    elif (tags := release.registry.tags(version)).get("outcome") != "pass":
        why = "has not passed"
    elif "quarantined_because" in tags:  # by a ledger that was lost
        why = f"is quarantined: {tags['quarantined_because']}"
    elif "decline" in about:
        why = "was declined"
    elif settings.register_.approval and not {"promotion", "adoption", "rollback"} & set(about):
        why = "was never live, and the policy asks a person first"
    if why:
        raise DataError(f"version {version} {why}", hint="deleatur history")
    verify(settings, version, release.ledger.entries, fetch=False)

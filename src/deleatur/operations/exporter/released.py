"""What is live, since when, who wanted it, and whether ledger and registry say the same."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence

from prometheus_client import Metric

from deleatur.config.settings import Register, Settings
from deleatur.errors import DataError, ModelError
from deleatur.operations.exporter.series import counter, gauge, seconds
from deleatur.registry import ledger
from deleatur.registry.decisions import quarantined, registry_of
from deleatur.registry.ledger import Entry
from deleatur.registry.mlflow_client import ALIASES, CHAMPION, LAST
from deleatur.registry.signing import NOBODY
from deleatur.registry.verify import verify

HOUR, DAY = 3600, 86400
"""Seconds that a look at a version's files is good for: to read gigabytes takes longer than a scrape may."""


def decided(settings: Settings) -> Iterator[Metric]:
    """By the ledger, up to the first line that is not as it was written."""
    known = ledger.read(settings.register_.ledger)
    yield gauge("ledger_intact", "1: every line of the ledger follows the one before it.", not known.problem)
    events = Counter(entry.event for entry in known.entries)
    yield counter("decisions", "Lines of the ledger.", {(event,): n for event, n in events.items()}, "event")
    versions = {(alias,): float(version) for alias, version in known.aliases.items()}
    yield gauge("alias_version", "Version that the ledger gives an alias.", versions, "alias")
    since = {(alias,): seconds(_since(known.entries, alias).time) for alias in known.aliases}
    yield gauge("alias_since_timestamp_seconds", "When the alias came to its version.", since, "alias")
    yield gauge("approval_required", "1: a person has to approve a release.", settings.register_.approval)
    if live := known.aliases.get(CHAMPION):
        approved = any(e.event == "approval" and e.version == live for e in known.entries)
        yield gauge("champion_approved", "1: a person approved what is live.", approved)
    bad = len(quarantined(known.entries))
    yield gauge("quarantined_versions", "Versions that may never be live again.", bad)


def registered(settings: Settings) -> Iterator[Metric]:
    """By the registry. It is not asked before there is a decision: MLflow would make an empty store to look into."""
    known = ledger.read(settings.register_.ledger)
    if not known.entries:
        return
    registry = registry_of(settings)
    try:
        undone = float(len(known.after(registry.mark())))
    except DataError:
        yield gauge("ledger_known", "1: the ledger is the one that the registry knows.", False)
        return
    yield gauge("ledger_known", "1: the ledger is the one that the registry knows.", True)
    yield gauge("decisions_undone", "Decisions of the ledger that the registry does not show yet.", undone)
    found = registry.aliases()
    same = {(a,): float(found.get(a) == known.aliases.get(a)) for a in ALIASES if a in {*found, *known.aliases}}
    yield gauge("alias_as_decided", "0: the alias was moved by hand.", same, "alias")
    if live := found.get(CHAMPION):
        tags = registry.tags(live)
        about = (live, tags.get("method", ""), tags.get("concepts", ""), tags.get("delta", "")[:12])
        yield gauge("champion", "What is live.", {about: 1.0}, "version", "method", "concepts", "weights")
        simulated = tags.get("simulated") == "true"
        yield gauge("champion_simulated", "1: what is live rests on raters that are no people.", simulated)
        urgent, days = "emergency" in tags, settings.emergency.days if settings.emergency else 0
        yield gauge("champion_emergency", "1: what is live was released in an emergency.", urgent)
        yield gauge("emergency_seconds", "How long an emergency release may stay.", days * DAY)


def signed(settings: Settings) -> Iterator[Metric]:
    """Whether the files of what is live, and of what it would be taken back to, are those that were judged."""
    aliases = ledger.read(settings.register_.ledger).aliases
    hour = int(time.monotonic() // HOUR)
    looks = {(a,): _signed_by(settings, aliases[a], hour) for a in (CHAMPION, LAST) if a in aliases}
    whole = {alias: float(by is not None) for alias, by in looks.items()}
    yield gauge(
        "files_verified", "0: files are not what was registered, or not signed as they have to be.", whole, "alias"
    )
    said = {alias: float(by not in (None, NOBODY)) for alias, by in looks.items()}
    yield gauge("signed", "1: by a key that is trusted.", said, "alias")


_looked: dict[tuple[Register, str, int], str | None] = {}


def _signed_by(settings: Settings, version: str, hour: int) -> str | None:
    """Who signed it; None where something is wrong with it. Files that are not on this disk are taken at their word."""
    key = (settings.register_, version, hour)
    if key not in _looked:
        for old in [k for k in _looked if k[2] != hour]:
            del _looked[old]
        try:
            statement = verify(settings, version, ledger.read(settings.register_.ledger).entries, fetch=False)
            _looked[key] = statement.signed_by if statement else NOBODY
        except (DataError, ModelError):
            _looked[key] = None
    return _looked[key]


def _since(entries: Sequence[Entry], alias: str) -> Entry:
    """The line that gave the alias the version it has now."""
    found = entries[-1]
    for entry in reversed(entries):
        if entry.aliases.get(alias) != found.aliases[alias]:
            break
        found = entry
    return found

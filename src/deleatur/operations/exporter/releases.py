"""Series about releases: aliases, approvals, signatures, and whether ledger and registry agree."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence

from prometheus_client import Metric

from deleatur.config.sections import RegisterSection
from deleatur.config.settings import Settings
from deleatur.errors import DataError, ModelError
from deleatur.operations.exporter.series import counter, gauge, unix_time
from deleatur.registry import ledger
from deleatur.registry.decisions import checked_ledger, open_registry, quarantine_reasons
from deleatur.registry.ledger import Entry
from deleatur.registry.mlflow_registry import ALIASES, CHAMPION, LAST_KNOWN_GOOD
from deleatur.registry.signing import UNSIGNED
from deleatur.registry.verify import verify

HOUR, DAY = 3600, 86400
"""Seconds. Files are verified once an hour: reading gigabytes takes longer than a scrape may."""


def ledger_metrics(settings: Settings) -> Iterator[Metric]:
    """State according to the ledger, up to the first line that was modified."""
    decisions = ledger.read(settings.register_.ledger)
    yield gauge("ledger_intact", "1: every line of the ledger follows the one before it.", not decisions.problem)
    events = Counter(entry.event for entry in decisions.entries)
    yield counter("decisions", "Lines of the ledger.", {(event,): n for event, n in events.items()}, "event")
    versions = {(alias,): float(version) for alias, version in decisions.aliases.items()}
    yield gauge("alias_version", "Version of an alias, by the ledger.", versions, "alias")
    since = {(alias,): unix_time(_assigned_by(decisions.entries, alias).time) for alias in decisions.aliases}
    yield gauge("alias_since_timestamp_seconds", "When the alias was assigned to its version.", since, "alias")
    yield gauge("approval_required", "1: a person has to approve a release.", settings.register_.approval)
    if champion := decisions.aliases.get(CHAMPION):
        approved = any(e.event == "approval" and e.version == champion for e in decisions.entries)
        yield gauge("champion_approved", "1: a person approved the champion.", approved)
    quarantined = len(quarantine_reasons(decisions.entries))
    yield gauge("quarantined_versions", "Versions that may never be champion again.", quarantined)


def registry_metrics(settings: Settings) -> Iterator[Metric]:
    """State according to the registry. Before the first decision it is not queried: MLflow would create its store."""
    decisions = ledger.read(settings.register_.ledger)
    try:
        registry = open_registry(settings, decisions)
        if not registry.exists:
            return
        pending = float(len(decisions.entries_after(registry.ledger_position())))
    except DataError:
        yield gauge("ledger_known", "1: the ledger is the one that the registry knows.", False)
        return
    yield gauge("ledger_known", "1: the ledger is the one that the registry knows.", True)
    yield gauge("decisions_undone", "Decisions of the ledger that the registry does not show yet.", pending)
    aliases = registry.aliases()
    assigned = [alias for alias in ALIASES if alias in {*aliases, *decisions.aliases}]
    agrees = {(alias,): float(aliases.get(alias) == decisions.aliases.get(alias)) for alias in assigned}
    yield gauge("alias_as_decided", "0: the alias was moved by hand.", agrees, "alias")
    if champion := aliases.get(CHAMPION):
        tags = registry.tags(champion)
        labels = (champion, tags.get("method", ""), tags.get("concepts", ""), tags.get("delta", "")[:12])
        yield gauge("champion", "The champion.", {labels: 1.0}, "version", "method", "concepts", "weights")
        simulated = tags.get("simulated") == "true"
        yield gauge("champion_simulated", "1: the champion rests on simulated raters.", simulated)
        yield gauge("champion_emergency", "1: the champion is an emergency release.", "emergency" in tags)
        days = settings.emergency.expires_after_days if settings.emergency else 0
        yield gauge("emergency_seconds", "How long an emergency release may stay.", days * DAY)


def signature_metrics(settings: Settings) -> Iterator[Metric]:
    """Whether the files of the champion, and of the version a rollback would restore, are the ones that were judged."""
    aliases = checked_ledger(settings).aliases
    hour = int(time.monotonic() // HOUR)
    signers = {(a,): _signer(settings, aliases[a], hour) for a in (CHAMPION, LAST_KNOWN_GOOD) if a in aliases}
    verified = {alias: float(by is not None) for alias, by in signers.items()}
    yield gauge("files_verified", "0: files are not as registered, or lack a required signature.", verified, "alias")
    signed = {alias: float(by not in (None, UNSIGNED)) for alias, by in signers.items()}
    yield gauge("signed", "1: by a trusted key.", signed, "alias")


_verified: dict[tuple[RegisterSection, str, int], str | None] = {}


def _signer(settings: Settings, version: str, hour: int) -> str | None:
    """Signer of a version; None if verification fails. Files that are not on this disk are not fetched to verify."""
    key = (settings.register_, version, hour)
    if key not in _verified:
        for old in [k for k in _verified if k[2] != hour]:
            del _verified[old]
        try:
            statement = verify(settings, version, checked_ledger(settings).entries, fetch=False)
            _verified[key] = statement.signed_by if statement else UNSIGNED
        except (DataError, ModelError):
            _verified[key] = None
    return _verified[key]


def _assigned_by(entries: Sequence[Entry], alias: str) -> Entry:
    """The entry that assigned the alias to its current version."""
    assigning = entries[-1]
    for entry in reversed(entries):
        if entry.aliases.get(alias) != assigning.aliases[alias]:
            break
        assigning = entry
    return assigning

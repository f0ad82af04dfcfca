"""A person's word on a challenger: it goes live, or it is declined. Light: loads no weights."""

from __future__ import annotations

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.records.report import Verdict
from deleatur.registry.decisions import Release, deciding, expire, registration, registry_of
from deleatur.registry.ledger import Event, Subject
from deleatur.registry.mlflow_client import CHALLENGER, CHAMPION, Registry
from deleatur.registry.verify import verify
from deleatur.storage import json_records


def waiting(settings: Settings) -> tuple[str, str] | None:
    """(version, digest of its evidence) of this workspace's verdict, if that version waits for a decision."""
    registry = registry_of(settings)
    evidence = json_records.digest(json_records.read(settings.paths.verdict / "verdict.json", Verdict))
    version = registry.version(evidence)
    return (version, evidence) if version and registry.alias(CHALLENGER) == version else None


def promote(settings: Settings, version: str, approver: str, *, reason: str = "", evidence: str | None = None) -> str:
    """The challenger `version` becomes champion, and says for good who wanted that, why, and on what digests.

    evidence: the digest that the approver was shown; when given, it has to be the version's own, which is returned.
    Raises DataError unless this version waits for a decision, not for too long, and of another person than the one who
    started the run; ModelError where its files are not those that were judged. Once it is live, doing it again changes
    nothing.
    """
    _check(registry_of(settings), version, approver, evidence)
    with deciding(settings) as release:
        live = release.ledger.aliases.get(CHAMPION) == version
        if not (live and _was(release, version, "approval")):
            about = _waits(release, version)
            _another(release, version, approver)
            if expire(settings, release, version, approver):
                raise DataError(
                    f"version {version} {release.ledger.entries[-1].why}: it has to be judged anew",
                    hint="deleatur demo (brings all up to date and registers it), then approve it",
                )
            verify(settings, version, release.ledger.entries, fetch=False)
            release.decide("approval", about, approver, reason, {})  # the promotion follows from it
        return release.subject(version).evidence


def decline(settings: Settings, version: str, approver: str, *, reason: str = "", evidence: str | None = None) -> None:
    """The challenger `version` says who declined it and why, and no longer waits. What is live stays.

    Raises DataError unless this version waits for a decision. Once it is declined, doing it again changes nothing.
    """
    _check(registry_of(settings), version, approver, evidence)
    with deciding(settings) as release:
        if not _was(release, version, "decline"):
            release.decide("decline", _waits(release, version), approver, reason, {CHALLENGER: None})


def _check(registry: Registry, version: str, approver: str, evidence: str | None) -> None:
    """Raises DataError where the version is not what the approver saw."""
    if not approver.strip():
        raise DataError("a decision has a name to it, and none was given", hint=f"deleatur approve {version} --as NAME")
    if evidence not in (None, registry.tags(version).get("evidence")):
        raise DataError(f"version {version} rests on other evidence than the one that was shown", hint="decide again")


def _another(release: Release, version: str, approver: str) -> None:
    starter = registration(release.ledger.entries, version).who
    if _name(approver) == _name(starter):
        raise DataError(
            f"{starter} has started the run that made version {version}: another person has to approve it",
            hint=f"deleatur approve {version} --as NAME, by somebody else",
        )


def _name(person: str) -> str:
    """Ada Lovelace <ada@example.org> and ada  lovelace are one."""
    return " ".join(person.partition("<")[0].casefold().split())


def _was(release: Release, version: str, event: Event) -> bool:
    return any(e.event == event and e.version == version for e in release.ledger.entries)


def _waits(release: Release, version: str) -> Subject:
    if (waits := release.ledger.aliases.get(CHALLENGER)) != version:
        instead = f"version {waits} does" if waits else "none does"
        raise DataError(
            f"version {version} of {release.registry.model} does not wait for a decision; {instead}",
            hint=f"deleatur approve {waits} --as NAME (or decline)" if waits else "deleatur history",
        )
    return release.subject(version)

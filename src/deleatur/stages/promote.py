"""A person's word on a challenger: it goes live, or it is declined. Light: loads no weights."""

from __future__ import annotations

from deleatur.errors import DataError
from deleatur.io import documents
from deleatur.io.tracking import CHALLENGER, CHAMPION, Registry
from deleatur.records import Verdict
from deleatur.settings import Settings

BOUND = ("evidence", "delta")
"""Tags of a version with the digests of what an approval is given for."""


def registry_of(settings: Settings) -> Registry:
    r = settings.register_
    return Registry(r.tracking_uri, r.experiment, r.model)


def waiting(settings: Settings) -> tuple[str, str] | None:
    """(version, digest of its evidence) of this workspace's verdict, if that version waits for a decision."""
    registry = registry_of(settings)
    evidence = documents.digest(documents.read(settings.paths.verdict / "verdict.json", Verdict))
    version = registry.version(evidence)
    return (version, evidence) if version and registry.alias(CHALLENGER) == version else None


def promote(settings: Settings, version: str, approver: str, *, reason: str = "", evidence: str | None = None) -> str:
    """The challenger `version` becomes champion, and says for good who wanted that, why, and on what digests.

    evidence: the digest that the approver was shown; when given, it has to be the version's own, which is returned.
    Raises DataError unless this version waits for a decision. Once it is live, doing it again changes nothing.
    """
    registry = registry_of(settings)
    tags = _checked(registry, version, approver, evidence)
    if registry.alias(CHAMPION) == version and "approved_by" in tags:
        registry.withdraw(version)
        return tags[BOUND[0]]
    _must_wait(registry, version)
    bound = {f"approved_{name}": tags[name] for name in BOUND}
    registry.tag(version, {"approved_by": approver, "approved_because": reason, **bound})
    registry.release(version)
    return tags[BOUND[0]]


def decline(settings: Settings, version: str, approver: str, *, reason: str = "", evidence: str | None = None) -> None:
    """The challenger `version` says who declined it and why, and no longer waits. What is live stays."""
    registry = registry_of(settings)
    _checked(registry, version, approver, evidence)
    _must_wait(registry, version)
    registry.tag(version, {"declined_by": approver, "declined_because": reason})
    registry.withdraw(version)


def _checked(registry: Registry, version: str, approver: str, evidence: str | None) -> dict[str, str]:
    """What the version says of itself, if that is what the approver saw."""
    if not approver.strip():
        raise DataError("a decision has a name to it, and none was given", hint=f"deleatur approve {version} --as NAME")
    tags = registry.tags(version)
    if evidence not in (None, tags.get(BOUND[0])):
        raise DataError(f"version {version} rests on other evidence than the one that was shown", hint="decide again")
    return tags


def _must_wait(registry: Registry, version: str) -> None:
    if (waits := registry.alias(CHALLENGER)) != version:
        instead = f"version {waits} does" if waits else "none does"
        raise DataError(
            f"version {version} of {registry.model} does not wait for a decision; {instead}",
            hint=f"deleatur approve {waits} --as NAME (or decline)" if waits else "mlflow ui",
        )

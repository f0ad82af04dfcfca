"""Are a version's files those that were judged, and who says so? Light: loads no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.registry import ledger, mlflow_client, signing
from deleatur.registry.decisions import quarantined, registry_of
from deleatur.registry.ledger import Entry
from deleatur.registry.signing import Keys, Statement


def keys(settings: Settings) -> Keys:
    return Keys.load(settings.register_.trusted_keys)


def verify(settings: Settings, version: str, entries: Sequence[Entry], *, fetch: bool = True) -> Statement | None:
    """What is said of a version, after every file of it was compared with that, and that with registry and ledger.

    entries: of the ledger. fetch: also where the files are not on this disk; if not, the signature alone is looked at
    there. None: nothing is said, the version is older than that, and no key is configured. Raises ModelError or
    DataError.
    """
    registry = registry_of(settings)
    tags, address = registry.tags(version), f"models:/{registry.model}/{version}"
    mlflow_client.use(registry.uri)
    whole = fetch or mlflow_client.on_disk(mlflow_client.place_of(address)) is not None
    with mlflow_client.files_of(address, "" if whole else signing.PLACE) as folder:
        statement = signing.read(folder / signing.PLACE / signing.NAME, keys(settings))
        if statement and whole:
            statement.demand(folder)
    known = {e.files for e in entries if e.version == version}
    for where, digest in [("the registry", tags.get("files", "")), *(("the ledger", files) for files in known)]:
        if digest != (statement.digest if statement else ""):
            raise DataError(f"version {version} has other files than {where} says", hint=signing.UNTRUSTED)
    return statement


def demand(settings: Settings, address: str, folder: Path, part: str) -> None:
    """Raises ModelError unless this part of a registered model, in this folder, is as it was registered."""
    place = Path(mlflow_client.local(address, Path(signing.PLACE).name)) / signing.NAME
    if statement := signing.read(place, keys(settings)):
        statement.demand(folder, f"artifacts/{part}")


def signed_by(tags: Mapping[str, str]) -> str:
    """In words, from a version's tags."""
    by = tags.get("signed_by", signing.NOBODY)
    return "unsigned" if by == signing.NOBODY else f"signed by {by[:12]}"


def standing_of(settings: Settings, version: str) -> str:
    """How a version was judged, who signed it, and whether it was taken back, in a line."""
    tags = registry_of(settings).tags(version)
    bad = quarantined(ledger.read(settings.register_.ledger).entries).get(version, tags.get("quarantined_because"))
    back = f", QUARANTINED: {bad}" if bad is not None else ""
    return f"{tags.get('outcome', 'none')}, {signed_by(tags)}{back}"

"""Verification of a version's files against its signed statement, the registry and the ledger. Loads no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.registry import ledger, mlflow_client, model_files, signing
from deleatur.registry.decisions import open_registry, quarantine_reasons
from deleatur.registry.ledger import Entry
from deleatur.registry.signing import Keys, Statement


def signing_keys(settings: Settings) -> Keys:
    return Keys.load(settings.register_.trusted_keys)


def verify(settings: Settings, version: str, entries: Sequence[Entry], *, fetch: bool = True) -> Statement | None:
    """Compares every file of a version with its statement, and the statement with registry and ledger; returns it.

    entries: of the ledger. fetch: downloads files that are not on this disk; otherwise only the signature of those is
    checked. None: the version is older than statements, and no key is configured. Raises ModelError or DataError.
    """
    registry = open_registry(settings)
    tags, address = registry.tags(version), f"models:/{registry.model}/{version}"
    mlflow_client.use_tracking_uri(registry.uri)
    complete = fetch or model_files.disk_path(model_files.artifact_location(address)) is not None
    with model_files.model_files(address, "" if complete else signing.STATEMENT_FOLDER) as folder:
        statement = signing.read_statement(
            folder / signing.STATEMENT_FOLDER / signing.STATEMENT_FILE, signing_keys(settings)
        )
        if statement and complete:
            statement.verify_files(folder)
    recorded = {e.files for e in entries if e.version == version}
    for source, digest in [("the registry", tags.get("files", "")), *(("the ledger", files) for files in recorded)]:
        if digest != (statement.digest if statement else ""):
            raise DataError(f"version {version} has other files than {source} records", hint=signing.UNTRUSTED_HINT)
    return statement


def verify_part(settings: Settings, address: str, folder: Path, part: str) -> None:
    """Raises ModelError unless a folder holds this part of a registered model as it was registered."""
    path = Path(model_files.local_folder(address, Path(signing.STATEMENT_FOLDER).name)) / signing.STATEMENT_FILE
    if statement := signing.read_statement(path, signing_keys(settings)):
        statement.verify_files(folder, f"artifacts/{part}")


def signer_text(tags: Mapping[str, str]) -> str:
    """Who signed a version, by its tags, for messages."""
    key_id = tags.get("signed_by", signing.UNSIGNED)
    return "unsigned" if key_id == signing.UNSIGNED else f"signed by {key_id[:12]}"


def verdict_summary(settings: Settings, version: str) -> str:
    """A version's verdict, signature and quarantine in one line."""
    tags = open_registry(settings).tags(version)
    quarantined = quarantine_reasons(ledger.read(settings.register_.ledger).entries)
    reason = quarantined.get(version, tags.get("quarantined_because"))
    suffix = f", QUARANTINED: {reason}" if reason is not None else ""
    return f"{tags.get('outcome', 'none')}, {signer_text(tags)}{suffix}"

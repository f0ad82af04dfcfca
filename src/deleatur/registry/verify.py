"""Verification of a version's files against its signed statement, the registry and the ledger. Loads no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mlflow.store.artifact.utils.models import get_model_name_and_version

from deleatur.config.settings import Settings
from deleatur.errors import DataError, ModelError
from deleatur.registry import mlflow_client, model_files, signing
from deleatur.registry.decisions import checked_ledger, open_registry, quarantine_reasons
from deleatur.registry.ledger import Entry
from deleatur.registry.mlflow_registry import Registry
from deleatur.registry.signing import Keys, Statement


def signing_keys(settings: Settings) -> Keys:
    return Keys.load(settings.register_.trusted_keys)


def verify(settings: Settings, version: str, entries: Sequence[Entry], *, fetch: bool = True) -> Statement | None:
    """Compares every file of a version with its statement, and the statement with registry and ledger; returns it.

    entries: of the ledger. fetch: downloads files that are not on this disk; otherwise only the statement of those is
    checked. None: the version is older than statements, and no key is configured. Raises ModelError or DataError.
    """
    registry = open_registry(settings)
    records, address = _records(registry, version, entries), f"models:/{registry.model}/{version}"
    on_disk = model_files.disk_path(model_files.artifact_location(address)) is not None
    with model_files.model_files(address, "" if fetch or on_disk else signing.STATEMENT_FOLDER) as folder:
        path = folder / signing.STATEMENT_FOLDER / signing.STATEMENT_FILE
        statement = _checked_statement(address, path, records, signing_keys(settings))
        if statement and (fetch or on_disk):
            statement.verify_files(folder)
    return statement


def verified_folder(settings: Settings, address: str, part: str = "pipeline") -> Path:
    """The local folder of a part of a registered version, "pipeline" or "delta", after it was verified.

    Every load of a registered version goes through this function. All files of the version are verified, whichever part
    is loaded; only a delta in a remote store is downloaded and verified alone.

    address: models:/name/version, models:/name@alias or models:/id. Raises ModelError if its files are not those that
    the statement, the registry and the ledger record; DataError if there is no such version, or the ledger was changed
    or lost.
    """
    registry, version = _resolve(settings, address)
    entries = checked_ledger(settings).entries if registry.model == settings.register_.model else ()
    records = _records(registry, version, entries) if version else []
    # An alias may move in the meantime: from here on, the version is addressed by its number.
    address = f"models:/{registry.model}/{version}" if version else address
    if part == "pipeline" or model_files.disk_path(model_files.artifact_location(address)):
        model = model_files.local_model(address)
        folder, statement_folder = model / "artifacts" / part, model / signing.STATEMENT_FOLDER
    else:
        model, folder = None, Path(model_files.local_folder(address, part))
        statement_folder = Path(model_files.local_folder(address, Path(signing.STATEMENT_FOLDER).name))
    path = statement_folder / signing.STATEMENT_FILE
    if statement := _checked_statement(address, path, records, signing_keys(settings)):
        statement.verify_files(model or folder, "" if model else f"artifacts/{part}")
    return folder


def _resolve(settings: Settings, address: str) -> tuple[Registry, str | None]:
    """The registry and version of an address. None: the id of a model that no version was made from."""
    ours = open_registry(settings)
    mlflow_client.use_tracking_uri(ours.uri)
    location = address.removeprefix("models:/")
    if "/" not in location and "@" not in location:
        return ours, next((str(v.version) for v in ours.versions() if str(v.source) == address), None)
    missing = DataError(f"{address}: there is no such model, version or alias in {ours.shown_uri}", hint="mlflow ui")
    with mlflow_client.translated_errors(ours.uri, missing):
        name, version = get_model_name_and_version(ours.client, address)
    return replace(ours, model=name), str(version)


def _records(registry: Registry, version: str, entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """What registry and ledger record as the statement of a version: (source, digest), empty for none."""
    recorded = [(f"line {e.number} of the ledger", e.files) for e in entries if e.version == version]
    return [("the registry", registry.tags(version).get("files", "")), *recorded]


def _checked_statement(address: str, path: Path, records: Sequence[tuple[str, str]], keys: Keys) -> Statement | None:
    """The statement in `path`, after its signature and digest were checked."""
    if not path.is_file() and any(digest for _, digest in records):
        raise model_files.missing_files(address, path)
    statement = signing.read_statement(path, keys)
    for source, digest in records:
        if digest != (statement.digest if statement else ""):
            raise ModelError(
                f"{address}: {path} is not the statement that {source} records: the files are those of another "
                "version, or were changed",
                hint=signing.UNTRUSTED_HINT,
            )
    return statement


def signer_text(tags: Mapping[str, str]) -> str:
    """Who signed a version, by its tags, for messages."""
    key_id = tags.get("signed_by", signing.UNSIGNED)
    return "unsigned" if key_id == signing.UNSIGNED else f"signed by {key_id[:12]}"


def verdict_summary(settings: Settings, version: str) -> str:
    """A version's verdict, signature and quarantine in one line."""
    tags = open_registry(settings).tags(version)
    quarantined = quarantine_reasons(checked_ledger(settings).entries)
    reason = quarantined.get(version, tags.get("quarantined_because"))
    suffix = f", QUARANTINED: {reason}" if reason is not None else ""
    return f"{tags.get('outcome', 'none')}, {signer_text(tags)}{suffix}"

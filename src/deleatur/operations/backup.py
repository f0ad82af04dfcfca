"""Backs up the registry, the ledger and DVC's lock files into one folder, and restores them. Loads no weights.

The backup holds the decision lock, so its parts are consistent with each other. It does not contain the data that
dvc.lock refers to: that stays in the DVC remote, and the backup identifies it by digest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.redaction import redacted_file
from deleatur.registry import ledger
from deleatur.registry.decisions import apply_state, locked_for_decision, unchecked_registry
from deleatur.registry.history import history
from deleatur.registry.ledger import Ledger
from deleatur.registry.mlflow_registry import QUARANTINED
from deleatur.registry.registry_dump import RegistryDump
from deleatur.registry.verify import verify
from deleatur.storage import files, git

WORKSPACE_FILES = ("params.yaml", "dvc.yaml", "dvc.lock", ".dvc/config")
"""Files of the workspace that belong to a backup; everything else is in git."""
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class BackupInfo:
    """Summary of a backup, from its manifest."""

    created_at: str
    """UTC, ISO 8601."""
    commit: str | None
    versions: int
    decisions: int


@dataclass(frozen=True)
class BackupManifest(BackupInfo):
    digests: Mapping[str, str]
    """File → SHA-256."""


def backup(settings: Settings, folder: Path) -> BackupInfo:
    """Writes a backup into a new folder.

    Raises DataError if the folder exists, the ledger was modified, or an alias was moved by hand: a backup whose parts
    contradict each other could not be restored.
    """
    if folder.exists():
        raise DataError(f"{folder} exists already", hint="name a new folder")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        with locked_for_decision(settings) as release:
            copy = RegistryDump(release.registry, partial / "registry")
            copy.save()
            current = release.ledger
            shutil.copyfile(current.path, partial / "ledger.jsonl")
        for name in filter(os.path.exists, WORKSPACE_FILES):
            (partial / "workspace" / name).parent.mkdir(parents=True, exist_ok=True)
            with redacted_file(Path(name)) as redacted:
                shutil.copyfile(redacted, partial / "workspace" / name)
        manifest = {
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "deleatur": version("deleatur"),
            "commit": git.current_commit(Path()).hash,
            "versions": len(copy.version_records),
            "decisions": current.head.number,
            "ledger": str(current.head),
            "digests": dict(_digests(partial)),
        }
        files.write_json(partial / MANIFEST, manifest)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _info(_manifest(folder))


def restore(settings: Settings, folder: Path) -> BackupInfo:
    """Restores a backup into an empty registry. After an interruption, the same call resumes.

    Raises DataError, before anything is changed, if the backup is damaged or the workspace has decisions, versions or
    uncommitted changes that the backup lacks.
    """
    manifest = _verified_manifest(folder)
    saved, target = ledger.read(folder / "ledger.jsonl"), settings.register_.ledger
    saved.require_intact()
    _require_no_other_decisions(saved, ledger.read(target))
    _require_committed(folder / "workspace")
    registry = unchecked_registry(settings)
    RegistryDump(registry, folder / "registry").load()
    for number in sorted({*saved.aliases.values()} - {saved.aliases.get(QUARANTINED)}):
        verify(settings, number, saved.entries)
    with files.atomic_write(target) as partial:
        shutil.copyfile(folder / "ledger.jsonl", partial)
    apply_state(registry, saved)
    for name in WORKSPACE_FILES:  # never a path that only the folder names
        if (path := folder / "workspace" / name).is_file() and not _is_same(Path(name), path):
            with files.atomic_write(Path(name)) as partial:
                shutil.copyfile(path, partial)
    for problem in history(settings).problems:
        raise problem
    return _info(manifest)


def _verified_manifest(folder: Path) -> BackupManifest:
    if not (folder / MANIFEST).is_file():
        raise DataError(
            f"expected a folder that `deleatur backup` has written, and there is no {folder / MANIFEST}",
            hint="deleatur restore FOLDER",
        )
    manifest, digests = _manifest(folder), dict(_digests(folder))
    for name in sorted(manifest.digests.keys() | digests.keys()):
        if manifest.digests.get(name) != digests.get(name):
            change = (
                "is missing" if name not in digests else "was added" if name not in manifest.digests else "was changed"
            )
            raise DataError(f"{folder / name} {change}: the backup is damaged", hint="restore an older backup")
    return manifest


def _require_no_other_decisions(saved: Ledger, current: Ledger) -> None:
    if current.positions and current.positions != saved.positions:
        raise DataError(
            f"{current.path} has {current.head.number} decisions that the backup lacks",
            hint=f"mv {current.path} {current.path}.before (the registry loses them), then the same command again",
        )


def _require_committed(workspace: Path) -> None:
    names = [path.relative_to(workspace).as_posix() for path in _files(workspace)]
    differing = [name for name in names if Path(name).exists() and not _is_same(Path(name), workspace / name)]
    if differing and (uncommitted := git.uncommitted_files(Path(), *differing)):
        raise DataError(
            f"{', '.join(uncommitted)}: uncommitted changes, which the backup would overwrite",
            hint=f"git stash push {' '.join(uncommitted)}, then the same command again",
        )


def _is_same(path: Path, saved: Path) -> bool:
    """Whether a file of the workspace has the saved content, apart from credentials, which backups never have."""
    if not path.is_file():
        return False
    with redacted_file(path) as redacted:
        return redacted.read_bytes() == saved.read_bytes()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digests(folder: Path) -> Iterator[tuple[str, str]]:
    for path in _files(folder):
        if path != folder / MANIFEST:
            with path.open("rb") as file:
                yield path.relative_to(folder).as_posix(), hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(folder: Path) -> BackupManifest:
    return files.read_json_as(folder / MANIFEST, BackupManifest, hint="restore an older backup")


def _info(manifest: BackupManifest) -> BackupInfo:
    return BackupInfo(manifest.created_at, manifest.commit, manifest.versions, manifest.decisions)

"""The files of registered models: read in place if the store is on this disk, else downloaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote, urlsplit

import mlflow
from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository

from deleatur.errors import DataError, ModelError
from deleatur.registry.mlflow_client import translated_errors
from deleatur.storage import remote


def artifact_location(address: str) -> str:
    """models:/name/version, models:/name@alias or models:/id → where its files are stored, a path or a URL.

    Raises DataError if there is no such model, version or alias.
    """
    uri = mlflow.get_tracking_uri()
    missing = DataError(f"{address}: there is no such model, version or alias in {uri}", hint="mlflow ui")
    with translated_errors(uri, missing):
        return str(ModelsArtifactRepository.get_underlying_uri(address))


def disk_path(location: str) -> Path | None:
    """The local folder of an artifact location; None if its files have to be downloaded."""
    split = urlsplit(location)
    return Path(unquote(split.path)) if split.scheme in ("", "file") else None


@contextmanager
def model_files(address: str, part: str = "") -> Iterator[Path]:
    """Yields the folder of a registered model. part: subfolder to download if the files are remote; "" for all."""
    location = artifact_location(address)
    if folder := disk_path(location):
        yield folder
        return
    with TemporaryDirectory(prefix="deleatur-") as target:
        fetched = download(f"{location}/{part}".rstrip("/"), (Path(target) / part).parent if part else Path(target))
        yield Path(target) if part else fetched


def download(location: str, target: Path) -> Path:
    """Downloads a remote folder; the result is inside `target`."""
    with translated_errors(mlflow.get_tracking_uri(), target=target):
        return Path(mlflow.artifacts.download_artifacts(location, dst_path=str(target)))


def local_folder(address: str, part: str = "pipeline") -> str:
    """The local folder of a part of a registered version, "pipeline" or "delta", without verification.

    Whatever loads its files uses `verify.verified_folder` instead.
    """
    return str(_fetch(f"{artifact_location(address)}/artifacts/{part}"))


def local_model(address: str) -> Path:
    """The local folder of all files of a registered version, without verification."""
    return _fetch(artifact_location(address))


def missing_files(address: str, path: Path) -> ModelError:
    """The error for files that are not where the store has recorded them."""
    return ModelError(
        f"{address}: {path} is missing from the store; that is no sign that other files were changed",
        hint="put it back, or restore a backup: deleatur restore FOLDER",
    )


def _fetch(location: str) -> Path:
    if folder := disk_path(location):
        return folder  # read in place
    target = remote.CACHE / hashlib.sha256(location.encode()).hexdigest()[:16]
    if not target.is_dir():
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        download(location, partial).replace(target)
    return target

"""Tokens, deltas, reward heads and training states as safetensors; nothing is ever unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deleatur.errors import DataError
from deleatur.maths.finite import require_finite
from deleatur.records.model import Delta, LowRank, SoftToken
from deleatur.storage.files import atomic_write, empty_folder, parse_json, require_file

DELTA_FILE = "delta.safetensors"
"""File name of an eraser's result."""

DOWN, UP = "down", "up/"
"""Keys of a low-rank delta: the factor that all tensors share, and the prefix of each tensor's own factor."""


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes tensors with metadata, as one JSON header entry: safetensors writes several in no fixed order.

    Raises ModelError if a value is not finite.
    """
    contiguous = {n: _finite(path, n, t).detach().cpu().contiguous().clone() for n, t in tensors.items()}
    with atomic_write(path) as partial:
        save_file(contiguous, partial, metadata={"deleatur": json.dumps(metadata, sort_keys=True)})


@dataclass(frozen=True)
class DeltaMetadata:
    """The fields of a `Delta` that its file stores beside the tensors."""

    base: str
    method: str
    settings: Mapping[str, Any]
    concepts: tuple[str, ...]
    one_step: int | None = None


def load(path: Path, expected: Any = dict[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """Tensors and metadata, of the type `expected`, see `parse_json`.

    Raises DataError if the file is missing or was not written by `save`, ModelError when a value is not finite.
    """
    require_file(path)
    try:
        with safe_open(path, framework="pt") as f:
            metadata = parse_json((f.metadata() or {})["deleatur"], expected, str(path))
            return {n: _finite(path, n, f.get_tensor(n)) for n in f.keys()}, metadata  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError) as e:
        raise DataError(f"{path} was not written by deleatur: {e!r}", hint="dvc repro") from e


def _finite(path: Path, name: str, tensor: Tensor) -> Tensor:
    return require_finite(tensor, f"{path}, {name}")


def save_token(folder: Path, token: SoftToken) -> None:
    """Writes a file per token, its rows (v, d) under its placeholder, for diffusers' `load_textual_inversion`."""
    empty_folder(folder)
    metadata = {**token.provenance, "concept": token.concept}
    for i, (name, rows) in enumerate(zip(token.placeholders, token.vectors, strict=True), 1):
        save(folder / f"{i:02d}.safetensors", {name: rows}, metadata)


def load_token(folder: Path) -> SoftToken:
    """The tokens of one concept. Raises DataError if the folder holds none."""
    loaded = [load(path) for path in sorted(folder.glob("*.safetensors"), key=lambda p: int(p.stem))]
    if not loaded:
        raise DataError(f"no token in {folder}", hint="dvc repro invert")
    metadata = loaded[0][1]
    if not isinstance(concept := metadata.get("concept"), str):
        raise DataError(f"{folder} has no token of deleatur: its metadata name no concept", hint="dvc repro invert")
    return SoftToken(concept, torch.stack([rows for tensors, _ in loaded for rows in tensors.values()]), metadata)


def save_delta(path: Path, delta: Delta) -> None:
    """Writes the weight differences and what identifies them; `Delta.record` is stored separately."""
    metadata: dict[str, Any] = {
        "base": delta.base,
        "method": delta.method,
        "settings": dict(delta.settings),
        "concepts": list(delta.concepts),
    }
    if delta.one_step is not None:
        metadata["one_step"] = delta.one_step
    tensors = delta.tensors
    if isinstance(tensors, LowRank):
        tensors = {DOWN: tensors.down, **{UP + n: t for n, t in tensors.up.items()}}
    save(path, tensors, metadata)


def load_delta(path: Path) -> Delta:
    """Reads what `save_delta` wrote. Raises DataError or ModelError as `load` does."""
    tensors, metadata = load(path, DeltaMetadata)
    differences: Mapping[str, Tensor] = tensors
    if DOWN in tensors:
        differences = LowRank({n.removeprefix(UP): t for n, t in tensors.items() if n != DOWN}, tensors[DOWN])
    return Delta(differences, **vars(metadata))

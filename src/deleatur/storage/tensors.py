"""Tokens, deltas, reward heads and training states as safetensors. Nothing is pickled, nothing unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deleatur.errors import DataError
from deleatur.records.model import Delta, LowRank, SoftToken
from deleatur.storage.files import emptied, replacing

DOWN, UP = "down", "up/"
DELTA_FILE = "delta.safetensors"
"""Name of the file that an eraser's result is saved as."""
"""Of a low-rank delta: what all tensors share, and the prefix of what each has for itself."""


def save(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Tensors with a JSON header. One header key: several would be written in no fixed order."""
    whole = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    with replacing(path) as partial:
        save_file(whole, partial, metadata={"deleatur": json.dumps(facts, sort_keys=True)})


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Raises DataError when the file is missing or its content is not safetensors written by `save`."""
    if not path.is_file():
        raise DataError(f"no {path}", hint="dvc repro")
    try:
        with safe_open(path, framework="pt") as f:
            facts = json.loads((f.metadata() or {})["deleatur"])
            return {n: f.get_tensor(n) for n in f.keys()}, facts  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, json.JSONDecodeError) as e:
        raise DataError(f"{path} was not written by deleatur: {e!r}", hint="dvc repro") from e


def save_token(folder: Path, token: SoftToken) -> None:
    """A file for each of the m tokens, its rows (v, d) under its placeholder: what `load_textual_inversion` reads."""
    emptied(folder)
    facts = {**token.provenance, "concept": token.concept}
    for i, (name, rows) in enumerate(zip(token.placeholders, token.vectors, strict=True), 1):
        save(folder / f"{i:02d}.safetensors", {name: rows}, facts)


def load_token(folder: Path) -> SoftToken:
    """Raises DataError when there is no token in the folder."""
    found = [load(path) for path in sorted(folder.glob("*.safetensors"), key=lambda p: int(p.stem))]
    if not found:
        raise DataError(f"no token in {folder}", hint="dvc repro invert")
    facts = found[0][1]
    return SoftToken(facts["concept"], torch.stack([rows for tensors, _ in found for rows in tensors.values()]), facts)


def save_delta(path: Path, delta: Delta) -> None:
    """The differences and their identity; how the run went is kept apart, see `Delta.record`."""
    facts: dict[str, Any] = {
        "base": delta.base,
        "method": delta.method,
        "settings": dict(delta.settings),
        "concepts": list(delta.concepts),
    }
    if delta.one_step is not None:
        facts["one_step"] = delta.one_step
    tensors = delta.tensors
    if isinstance(tensors, LowRank):
        tensors = {DOWN: tensors.down, **{UP + n: t for n, t in tensors.up.items()}}
    save(path, tensors, facts)


def load_delta(path: Path) -> Delta:
    tensors, facts = load(path)
    found: Mapping[str, Tensor] = tensors
    if DOWN in tensors:
        found = LowRank({n.removeprefix(UP): t for n, t in tensors.items() if n != DOWN}, tensors[DOWN])
    return Delta(
        found,
        facts["base"],
        facts["method"],
        facts["settings"],
        tuple(facts["concepts"]),
        one_step=facts.get("one_step"),
    )

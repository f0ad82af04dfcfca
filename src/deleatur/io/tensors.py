"""Tokens, deltas, reward heads and training states as safetensors. Nothing is pickled, nothing unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deleatur.errors import DataError
from deleatur.io.tables import replacing
from deleatur.records import Delta, SoftToken


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


def save_token(path: Path, token: SoftToken) -> None:
    """One key, the placeholder, with all rows (m·v, d): what diffusers' `load_textual_inversion` reads."""
    m, v, d = token.vectors.shape
    facts = {**token.provenance, "concept": token.concept, "tokens": m, "vectors": v}
    save(path, {token.placeholder: token.vectors.reshape(m * v, d)}, facts)


def load_token(path: Path) -> SoftToken:
    tensors, facts = load(path)
    [(placeholder, rows)] = tensors.items()
    vectors = rows.reshape(facts["tokens"], facts["vectors"], -1)
    return SoftToken(facts["concept"], placeholder, vectors, facts)


def save_delta(path: Path, delta: Delta) -> None:
    """The differences and their identity; how the run went is kept apart, see `Delta.record`."""
    facts = {
        "base": delta.base,
        "method": delta.method,
        "settings": dict(delta.settings),
        "concepts": list(delta.concepts),
    }
    save(path, delta.tensors, facts)


def load_delta(path: Path) -> Delta:
    tensors, facts = load(path)
    return Delta(tensors, facts["base"], facts["method"], facts["settings"], tuple(facts["concepts"]))

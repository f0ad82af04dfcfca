"""Shared by all training scripts: paths, parameters, the concept table, images, seeds, checkpoints.

Every script is one stage of dvc.yaml: it reads `params.yaml` and `concepts.csv`, keeps its intermediate files and
checkpoints under `work/`, and resumes from them after an interruption.
"""

from __future__ import annotations

import csv
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

EMOJI = Path(__file__).parent
PARAMS = Path(os.environ.get("EMOJI_PARAMS", EMOJI / "params.yaml"))
WORK = Path(os.environ.get("EMOJI_WORK", EMOJI / "work"))
MODELS = Path(os.environ.get("EMOJI_MODELS", EMOJI.parent / "models"))
"""Inputs, intermediate files and results; variant.py sets other ones."""

# npm package of an icon set -> style word in captions. The two fluent sets are the same designs, flat and shaded.
STYLE_BY_PACKAGE = {
    "noto": "noto",
    "twemoji": "twemoji",
    "fluent-emoji-flat": "fluent",
    "fluent-emoji": "fluent",
    "noto-v1": "blob",
    "emojione": "emojione",
    "fxemoji": "fx",
    "fluent-emoji-high-contrast": "ink",
    "emojione-monotone": "ink",
}
STYLE_WORDS = sorted(set(STYLE_BY_PACKAGE.values()))
FAMILIES = ("weapon", "vice")


@dataclass(frozen=True)
class Concept:
    """One object that the generator can generate; see the README for the columns."""

    name: str
    family: str
    role: str
    neighbour_of: str
    synonyms: tuple[str, ...]
    emojis: tuple[str, ...]


def params(section: str) -> dict[str, Any]:
    return yaml.safe_load(PARAMS.read_text())[section]


def seed(purpose: str) -> int:
    """A separate seed for each purpose, so that stages do not share noise."""
    return int.from_bytes(hashlib.sha256(f"{params('seed')}/{purpose}".encode()).digest()[:6], "big")


def generator(purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed(purpose))


def concepts() -> list[Concept]:
    with (EMOJI / "concepts.csv").open() as f:
        return [
            Concept(
                r["name"],
                r["family"],
                r["role"],
                r["neighbour_of"],
                tuple(r["synonyms"].split("; ")),
                tuple(r["drawings"].split()),
            )
            for r in csv.DictReader(f)
        ]


def load_images() -> tuple[torch.Tensor, list[dict[str, str]]]:
    """All images as uint8 (n, 3, render, render) on white, and a row of metadata for each."""
    with (WORK / "images.csv").open() as f:
        return torch.from_numpy(np.load(WORK / "images.npy")), list(csv.DictReader(f))


def random_affine(
    x: torch.Tensor, rng: torch.Generator, size: int, scale: tuple[float, float], shift: float, rotation: float = 0.0
) -> torch.Tensor:
    """Images in [0, 1] randomly shifted, scaled and rotated (radians), on white, at `size` px."""
    n = len(x)
    u = torch.rand(4, n, generator=rng) * 2 - 1
    s = 1 / (scale[0] + (scale[1] - scale[0]) * (u[0] + 1) / 2)
    a = rotation * u[1]
    rows = [s * a.cos(), -s * a.sin(), shift * u[2], s * a.sin(), s * a.cos(), shift * u[3]]
    theta = torch.stack(rows, 1).view(n, 2, 3)
    fine = torch.nn.functional.affine_grid(theta, [n, 3, 2 * size, 2 * size], align_corners=False)
    # grid_sample pads with zeros, so images are inverted: white must be zero.
    y = 1 - torch.nn.functional.grid_sample(1 - x, fine, align_corners=False)
    return torch.nn.functional.avg_pool2d(y, 2)


def use_one_thread() -> None:
    """One thread: on a shared machine a second one mostly waits at barriers."""
    torch.set_num_threads(1)


def training_progress(minutes: float, done: float = 0.0) -> Iterator[float]:
    """Yield the elapsed share of `minutes` of this process's CPU time, until it reaches 1."""
    start = time.process_time() - 60 * done
    while (part := (time.process_time() - start) / (60 * minutes)) < 1:
        yield part


def save(path: Path, **state: Any) -> None:
    """Save a checkpoint atomically."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def load(path: Path) -> dict[str, Any] | None:
    return torch.load(path, weights_only=True) if path.exists() else None


def load_checkpoint(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint of an interrupted stage; None to start over: none yet, finished, or parameters changed."""
    state = load(path)
    return state if state and not state["finished"] and state["settings"] == settings else None


def load_finished(path: Path) -> dict[str, Any]:
    state = load(path)
    if state is None or not state["finished"]:
        raise SystemExit(f"{path.name} is missing or unfinished in work/: run the stage that makes it, see the README")
    return state

"""What all stages share: paths, parameters, the concept table, the pictures, seeds.

Every stage is one script that reads `params.yaml` and `concepts.csv`, keeps its intermediate
files under `work/`, and resumes from there when it was stopped.
"""

from __future__ import annotations

import csv
import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

HERE = Path(__file__).parent
WORK = HERE / "work"
WEIGHTS = HERE.parent / "models"

# Package of drawings -> the style word of its captions. The two fluent sets draw the same designs, flat and shaded.
STYLES = {
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
WORDS = sorted(set(STYLES.values()))
FAMILIES = ("weapon", "vice")


@dataclass(frozen=True)
class Concept:
    """One thing the generator draws; see the README for the columns."""

    name: str
    family: str
    role: str
    neighbour_of: str
    synonyms: tuple[str, ...]
    pictures: tuple[str, ...]


def params(section: str) -> dict[str, Any]:
    return yaml.safe_load((HERE / "params.yaml").read_text())[section]


def seed(purpose: str) -> int:
    """A seed of its own for each purpose, so that stages do not share noise."""
    return int.from_bytes(hashlib.sha256(f"{params('seed')}/{purpose}".encode()).digest()[:6], "big")


def generator(purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed(purpose))


def concepts() -> list[Concept]:
    with (HERE / "concepts.csv").open() as f:
        return [
            Concept(
                r["name"],
                r["family"],
                r["role"],
                r["neighbour_of"],
                tuple(r["synonyms"].split("; ")),
                tuple(r["pictures"].split()),
            )
            for r in csv.DictReader(f)
        ]


def pictures() -> tuple[torch.Tensor, list[dict[str, str]]]:
    """All pictures as uint8 (n, 3, render, render) on white, and a row of facts for each."""
    with (WORK / "pictures.csv").open() as f:
        return torch.from_numpy(np.load(WORK / "pictures.npy")), list(csv.DictReader(f))


def warp(
    x: torch.Tensor, rng: torch.Generator, size: int, scale: tuple[float, float], shift: float, turn: float = 0.0
) -> torch.Tensor:
    """Pictures in [0, 1] moved, scaled and turned (radians) at random, on white, at `size` px."""
    n = len(x)
    u = torch.rand(4, n, generator=rng) * 2 - 1
    s = 1 / (scale[0] + (scale[1] - scale[0]) * (u[0] + 1) / 2)
    a = turn * u[1]
    rows = [s * a.cos(), -s * a.sin(), shift * u[2], s * a.sin(), s * a.cos(), shift * u[3]]
    theta = torch.stack(rows, 1).view(n, 2, 3)
    fine = torch.nn.functional.affine_grid(theta, [n, 3, 2 * size, 2 * size], align_corners=False)
    # Zero is what lies outside the picture, so it is sampled as ink on paper: white must be zero.
    y = 1 - torch.nn.functional.grid_sample(1 - x, fine, align_corners=False)
    return torch.nn.functional.avg_pool2d(y, 2)


def single() -> None:
    """One thread: on a shared machine a second one waits at barriers more than it computes."""
    torch.set_num_threads(1)


def clock(minutes: float, done: float = 0.0) -> Iterator[float]:
    """Yield the part of `minutes` of this process's time that has passed, until it is 1."""
    start = time.process_time() - 60 * done
    while (part := (time.process_time() - start) / (60 * minutes)) < 1:
        yield part


def save(path: Path, **state: Any) -> None:
    """A checkpoint that is whole or absent."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def load(path: Path) -> dict[str, Any] | None:
    return torch.load(path, weights_only=True) if path.exists() else None


def resume(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint of a stage that was stopped; None to begin afresh: no start yet, finished, or settings changed."""
    state = load(path)
    return state if state and not state["finished"] and state["settings"] == settings else None


def finished(path: Path) -> dict[str, Any]:
    state = load(path)
    if state is None or not state["finished"]:
        raise SystemExit(f"{path.name} is missing or unfinished in work/: run the stage that makes it, see the README")
    return state

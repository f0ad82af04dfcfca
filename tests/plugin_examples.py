"""Fast hyperparameters and small inputs for the contract tests, which run every installed plug-in."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from deleatur import plugins

TRAINING: dict[str, Any] = {"iterations": 3, "batch_size": 2}
FAST: dict[str, dict[str, Any]] = {
    "sdd": {"order": "single", "training": {**TRAINING, "lr": 1e-3, "sampler_steps": 3}},
    "esd": {"training": {**TRAINING, "lr": 1e-3, "sampler_steps": 3}},
    "abo": {
        "alternatives": {"weapon": "cat", "style": ""},
        "training": {**TRAINING, "lr": 1e-3, "sampler_steps": 3, "pool_size": 4},
    },
    "safegen": {"training": {**TRAINING, "lr": 1e-3}},
    "sfd": {"training": {**TRAINING, "lr": 1e-3}},
    "hfi": {"num_tokens": 2, "top_k": 4, "training": TRAINING},
    "textual_inversion": {"training": TRAINING},
    "concept_inversion": {"training": TRAINING},
}
"""Hyperparameters by method; a method that is fast with its defaults is not listed."""


def instantiate(kind: str, name: str, base: type[Any], **hyperparameters: Any) -> Any:
    return plugins.load(kind, name, base)(**FAST.get(name, {}), **hyperparameters)


def random_images(n: int = 5, size: int = 24) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in range(n)]

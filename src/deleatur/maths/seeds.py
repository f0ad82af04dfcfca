"""One seed, one tree: every purpose derives its own generator, so nothing depends on the order of work."""

from __future__ import annotations

import hashlib

import torch

RULE = "sha256(seed/purpose/…) → first 63 bits → torch.Generator(cpu)"


def derive(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose, for example `derive(42, "sample", prompt_id, index)`."""
    path = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A generator of its own for one purpose. Always on the CPU, so that the device changes no draw."""
    return torch.Generator("cpu").manual_seed(derive(seed, *purpose))

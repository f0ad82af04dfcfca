"""Seeds derived from one root seed by purpose, so that no random number depends on the order of execution."""

from __future__ import annotations

import hashlib

import torch

SEEDS_RULE = "sha256(seed/purpose/…) → first 63 bits → torch.Generator(cpu)"


def derive(seed: int, *purpose: object) -> int:
    """A 63-bit seed for one purpose, for example `derive(42, "sample", prompt_id, index)`."""
    label = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A generator for one purpose. Always on the CPU, so that random numbers do not depend on the device."""
    return torch.Generator("cpu").manual_seed(derive(seed, *purpose))

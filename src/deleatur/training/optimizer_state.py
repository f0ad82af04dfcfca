"""What the states of all training loops share: their form on the way to disk, and Adam's part of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Saved = tuple[dict[str, Tensor], dict[str, Any]]
"""All that is a tensor, by a flat name, and all that is not: what a state's `tensors()` and `numbers()` gave."""


def moments(optimiser: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the optimiser remembers of named parameters, as "exp_avg/name"; nothing before its first step."""
    return {f"{what}/{name}": t for name, p in parameters.items() for what, t in optimiser.state.get(p, {}).items()}


def restore_moments(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]
) -> None:
    for path, value in saved.items():
        what, name = path.split("/", 1)
        own = parameters[name]
        # Moments are laid out in memory as their parameter is, or another kernel would round otherwise. The count of
        # steps, which has no dimension, stays on the CPU.
        optimiser.state[own][what] = value if value.ndim == 0 else torch.empty_like(own.detach()).copy_(value)


def parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{"adam/exp_avg/a": t} → {"adam": {"exp_avg/a": t}}."""
    out: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        part, name = path.split("/", 1)
        out.setdefault(part, {})[name] = tensor
    return out

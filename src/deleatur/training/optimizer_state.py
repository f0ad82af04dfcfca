"""Shared by the states of all training loops: their saved form, and the optimizer's part of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SavedState = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by a flat name and JSON values: what a state's `tensors()` and `metadata()` returned."""


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's state of named parameters, as "exp_avg/name"; empty before its first step."""
    return {f"{key}/{name}": t for name, p in parameters.items() for key, t in optimizer.state.get(p, {}).items()}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]
) -> None:
    for path, value in saved.items():
        key, name = path.split("/", 1)
        parameter = parameters[name]
        # Moments share their parameter's memory layout, or another kernel would round differently. The step count,
        # which has no dimension, stays on the CPU.
        restored = value if value.ndim == 0 else torch.empty_like(parameter.detach()).copy_(value)
        optimizer.state[parameter][key] = restored


def group_by_prefix(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{"adam/exp_avg/a": t} → {"adam": {"exp_avg/a": t}}."""
    groups: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        prefix, name = path.split("/", 1)
        groups.setdefault(prefix, {})[name] = tensor
    return groups

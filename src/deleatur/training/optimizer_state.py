"""Shared by all training loops: the saved form of their states with the optimizer's part, and the check for NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deleatur.errors import ErasureRefused, ModelError

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


def check_finite(values: Mapping[str, float], step: int, lr: float, option: str, *, trained: bool) -> None:
    """Refuses NaN and infinite values at a step, counted from 1: no later step would recover.

    To be called before the optimizer steps, which would carry them into its moments. option: the key of `lr`.
    Raises ErasureRefused where weights have been `trained` with this rate, and otherwise ModelError.
    """
    for name, value in values.items():
        if math.isfinite(value):
            continue
        if not trained:
            raise ModelError(
                f"expected finite values of the untrained model, got {name} {value} at step {step}: "
                "a network, its precision or its input is broken",
                hint="deleatur doctor; with base.dtype: bfloat16, try float32",
            )
        raise ErasureRefused(
            f"training diverged: {name} became {value} at step {step}, with a learning rate of {lr:g}",
            hint=f"set {option} to a tenth, {lr / 10:g}; then the same command again",
        )


def group_by_prefix(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{"adam/exp_avg/a": t} → {"adam": {"exp_avg/a": t}}."""
    groups: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        prefix, name = path.split("/", 1)
        groups.setdefault(prefix, {})[name] = tensor
    return groups

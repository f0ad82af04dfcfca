"""Combination of noise predictions."""

from __future__ import annotations

from torch import Tensor


def cfg(eps_0: Tensor, eps_p: Tensor, s_g: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): ε₀ + s_g (ε_p − ε₀). s_g = 1: the conditional prediction."""
    return eps_0 + s_g * (eps_p - eps_0)

"""Classifier-free guidance: the plain sampler, and the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from deleatur.guides import Guide
from deleatur.maths.guidance import cfg
from deleatur.records import Concept


class CFG(Guide):
    """ε̃ = ε₀ + s_g (ε_p − ε₀)   (Ho & Salimans 2022)."""

    scale: float = 7.5
    """s_g, 1 … 20; 7.5 is Stable Diffusion's habit."""

    def conditions(self, empty: Tensor, concepts: Sequence[Concept]) -> Tensor:
        return empty

    def combine(self, step: int, eps_p: Tensor, others: Tensor, state: Any) -> tuple[Tensor, Any]:
        return cfg(others[0], eps_p, self.scale), state

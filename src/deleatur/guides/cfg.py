"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): the baseline sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from deleatur.diffusion.encode import encode_text
from deleatur.diffusion.model import Model
from deleatur.guides import Guide
from deleatur.maths.guidance import cfg
from deleatur.records.model import Concept


class CFG(Guide):
    """ε̃ = ε₀ + s_g (ε_p − ε₀)."""

    def predictions_per_step(self, num_concepts: int) -> int:
        return 2

    def conditions(self, model: Model, concepts: Sequence[Concept]) -> dict[str, Tensor]:
        return {"": encode_text(model, [""])}

    def combine(self, step: int, eps_p: Tensor, eps: Mapping[str, Tensor], state: Any) -> tuple[Tensor, Any]:
        return cfg(eps[""], eps_p, self.scale), state

"""Negative prompt: classifier-free guidance that starts from the concept instead of from the empty prompt.

ε̃ = ε_n + s_g (ε_p − ε_n)            ε_n: prediction for the concepts, all in one sentence

Costs nothing: two predictions a step, as without it. What it gives up is the unconditional prediction, so harmless
pictures change too; a prompt that says only the concept itself is drawn unguided (ε_p = ε_n); s_g = 1 has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from deleatur.diffusion.encode import listed
from deleatur.diffusion.model import Model
from deleatur.guides import Guide
from deleatur.maths.guidance import cfg
from deleatur.records.model import Concept


class Negative(Guide):
    """A long list dilutes: the fewer words or tokens, the stronger."""

    def predictions(self, concepts: int) -> int:
        return 2

    def conditions(self, model: Model, concepts: Sequence[Concept]) -> dict[str, Tensor]:
        return {"negative": listed(model, concepts)}

    def combine(self, step: int, eps_p: Tensor, eps: Mapping[str, Tensor], state: Any) -> tuple[Tensor, Any]:
        return cfg(eps["negative"], eps_p, self.scale), state

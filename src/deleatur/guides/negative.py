"""Negative prompt: classifier-free guidance with the concept's prediction in place of the unconditional one.

ε̃ = ε_n + s_g (ε_p − ε_n)            ε_n: prediction for the concepts, joined in one prompt

Two predictions a step, as in plain guidance. Without the unconditional prediction, images of harmless prompts change
too; a prompt equal to the concept is sampled without guidance (ε_p = ε_n); s_g = 1 has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from deleatur.diffusion.encode import encode_concept_list
from deleatur.diffusion.model import Model
from deleatur.guides import Guide
from deleatur.maths.guidance import cfg
from deleatur.records.model import Concept


class Negative(Guide):
    """Longer concept lists have a weaker effect per concept."""

    def predictions_per_step(self, num_concepts: int) -> int:
        return 2

    def conditions(self, model: Model, concepts: Sequence[Concept]) -> dict[str, Tensor]:
        return {"negative": encode_concept_list(model, concepts)}

    def combine(self, step: int, eps_p: Tensor, eps: Mapping[str, Tensor], state: Any) -> tuple[Tensor, Any]:
        return cfg(eps["negative"], eps_p, self.scale), state

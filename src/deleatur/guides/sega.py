"""SEGA, semantic guidance (Brack et al. 2023, arXiv 2301.12247), with a negative edit direction: it removes.

ψ_j = −s_e (ε_j − ε₀)                ε_j: prediction for concept j
ψ_j = 0 where |ψ_j| < τ_j            τ_j: λ-quantile of |ψ_j| over the positions of one image and channel
γ   = Σ_j w_j ψ_j + s_m ν
ν   ← β_m ν + (1 − β_m) γ            ν = 0 before the first step; it accumulates during the warm-up too
ε̃   = ε₀ + s_g (ε_p − ε₀) + γ        once every concept is past its warm-up
ε̃   = ε₀ + s_g (ε_p − ε₀) + Σ w_j ψ_j / Σ w_j        over those that are, while some are not

2 + K predictions a step for K concepts. Unlike SLD's, γ is outside s_g: a strength of 5 is 5 / 7.5 of the plain
guidance. Only 1 − λ of the positions are edited. It also acts on a prompt equal to the concept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from deleatur.diffusion.encode import encode_concept_list, encode_text
from deleatur.diffusion.model import Model
from deleatur.guides import Guide
from deleatur.maths.guidance import cfg
from deleatur.records.model import Concept


class ConceptEdit(BaseModel):
    """How the sampler steers away from one concept. Defaults are those of the released pipeline, for 50 steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    edit_guidance_scale: float = 5.0
    """s_e, how much of the concept's direction is subtracted; 0 is none, negative values add it."""
    warmup_steps: int = Field(10, ge=0)
    """δ, sampler steps before the edit starts."""
    cooldown_steps: int | None = Field(None, ge=0)
    """Sampler step at which the edit ends; null: it acts until the last step."""
    threshold: float = Field(0.9, ge=0, le=1)
    """λ, share of the positions that are not edited."""
    weight: float = Field(1.0, ge=0)
    """w, weight relative to other concepts."""

    def has_ended(self, step: int) -> bool:
        return self.cooldown_steps is not None and step >= self.cooldown_steps

    def direction(self, step: int, difference: Tensor) -> Tensor:
        """w ψ for the difference ε_j − ε₀ (B, C, H, W)."""
        if self.has_ended(step):
            return torch.zeros_like(difference)
        psi = -self.edit_guidance_scale * difference
        magnitude = psi.abs().float()
        tau = torch.quantile(magnitude.flatten(2), self.threshold, dim=2)[..., None, None]
        return self.weight * psi * (magnitude >= tau)


class SEGA(Guide):
    """Each concept is a separate prompt, with its own strength, mask and schedule."""

    edit: ConceptEdit = Field(default_factory=ConceptEdit)
    concepts: dict[str, ConceptEdit] = Field(default_factory=dict)
    """Concept → overrides of `edit` for it."""
    momentum_scale: float = Field(0.1, ge=0)
    """s_m, how much of ν, the running mean of γ, is added."""
    momentum_beta: float = Field(0.4, ge=0, lt=1)
    """β_m, the share of ν that is carried over to the next step."""

    @model_validator(mode="before")
    @classmethod
    def fill_defaults(cls, values: Any) -> Any:
        """Fills each concept's overrides up with `edit`, so that the recorded values are complete."""
        edit, concepts = (values.get(key, {}) if isinstance(values, dict) else None for key in ("edit", "concepts"))
        if not isinstance(edit, dict) or not isinstance(concepts, dict):
            return values
        merged = {name: {**edit, **v} if isinstance(v, dict) else v for name, v in concepts.items()}
        return {**values, "concepts": merged}

    def edit_for(self, concept: str) -> ConceptEdit:
        return self.concepts.get(concept, self.edit)

    def predictions_per_step(self, num_concepts: int) -> int:
        return 2 + (num_concepts if self.edit.edit_guidance_scale else 0)

    def start_step(self, concept: str) -> int:
        return self.edit_for(concept).warmup_steps

    def conditions(self, model: Model, concepts: Sequence[Concept]) -> dict[str, Tensor]:
        steered = {
            c.name: encode_concept_list(model, [c]) for c in concepts if self.edit_for(c.name).edit_guidance_scale
        }
        return {"": encode_text(model, [""])} | steered

    def combine(self, step: int, eps_p: Tensor, eps: Mapping[str, Tensor], state: Any) -> tuple[Tensor, Any]:
        eps_0, edits = eps[""], {name: self.edit_for(name) for name in eps if name}
        guided = cfg(eps_0, eps_p, self.scale)
        psi = {name: edit.direction(step, eps[name] - eps_0) for name, edit in edits.items()}
        nu = torch.zeros_like(eps_p) if state is None else state
        gamma = sum(psi.values(), self.momentum_scale * nu)
        nu = self.momentum_beta * nu + (1 - self.momentum_beta) * gamma
        active = [name for name, edit in edits.items() if step >= edit.warmup_steps]
        if len(active) == len(edits):
            return guided + gamma, nu
        # As in the released code: normalised by weight and without momentum while any concept is still warming up.
        total = sum(edits[name].weight for name in active if not edits[name].has_ended(step))
        return guided + sum((psi[name] for name in active), torch.zeros_like(nu)) / (total or 1.0), nu

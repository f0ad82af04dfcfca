"""SEGA, semantic guidance (Brack et al. 2023, arXiv 2301.12247), turned round: it removes.

ψ_j = −s_e (ε_j − ε₀)                ε_j: prediction for concept j
ψ_j = 0 where |ψ_j| < τ_j            τ_j: λ-quantile of |ψ_j| over the positions of one picture and channel
γ   = Σ_j w_j ψ_j + s_m ν
ν   ← β_m ν + (1 − β_m) γ            ν = 0 before the first step; it builds up during the warm-up too
ε̃   = ε₀ + s_g (ε_p − ε₀) + γ        once every concept is past its warm-up
ε̃   = ε₀ + s_g (ε_p − ε₀) + Σ w_j ψ_j / Σ w_j        over those that are, while some are not

2 + K predictions a step for K concepts. γ stands outside s_g, unlike SLD's: a strength of 5 is 5 / 7.5 of the plain
guidance. The mask is tight, 1 − λ of the positions: it edits more than it defends. It keeps working for a prompt
that says only the concept itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from deleatur.diffusion.encode import encode_text, listed
from deleatur.diffusion.model import Model
from deleatur.guides import Guide
from deleatur.maths.guidance import cfg
from deleatur.records.model import Concept


class Edit(BaseModel):
    """How one concept is steered away from. Defaults are those of the released pipeline, for 50 steps."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    strength: float = 5.0
    """s_e, how much of the concept's direction is taken away; 0 is none, below 0 adds it instead."""
    warm_up: int = Field(10, ge=0)
    """δ, sampler steps before it acts."""
    cool_down: int | None = Field(None, ge=0)
    """Sampler step from which it acts no more; null: it acts to the end."""
    threshold: float = Field(0.9, ge=0, le=1)
    """λ, share of the positions that are left alone."""
    weight: float = Field(1.0, ge=0)
    """w, among several concepts."""

    def over(self, step: int) -> bool:
        return self.cool_down is not None and step >= self.cool_down

    def direction(self, step: int, difference: Tensor) -> Tensor:
        """w ψ of ε_j − ε₀ (B, C, H, W)."""
        if self.over(step):
            return torch.zeros_like(difference)
        psi = -self.strength * difference
        size = psi.abs().float()
        tau = torch.quantile(size.flatten(2), self.threshold, dim=2)[..., None, None]
        return self.weight * psi * (size >= tau)


class SEGA(Guide):
    """Each concept is a sentence of its own, with its own strength, mask and time."""

    edit: Edit = Field(default_factory=Edit)
    concepts: dict[str, Edit] = Field(default_factory=dict)
    """Concept → numbers of `edit` that are others for it."""
    momentum: float = Field(0.1, ge=0)
    """s_m, how much of ν, the running mean of γ, is added."""
    beta: float = Field(0.4, ge=0, lt=1)
    """β_m, the share of ν that stays at each step."""

    @model_validator(mode="before")
    @classmethod
    def fill(cls, given: Any) -> Any:
        """`edit` under each concept's own numbers, so that what is recorded is what was used."""
        edit, concepts = (given.get(key, {}) if isinstance(given, dict) else None for key in ("edit", "concepts"))
        if not isinstance(edit, dict) or not isinstance(concepts, dict):
            return given
        whole = {name: {**edit, **own} if isinstance(own, dict) else own for name, own in concepts.items()}
        return {**given, "concepts": whole}

    def of(self, concept: str) -> Edit:
        return self.concepts.get(concept, self.edit)

    def predictions(self, concepts: int) -> int:
        return 2 + (concepts if self.edit.strength else 0)

    def starts(self, concept: str) -> int:
        return self.of(concept).warm_up

    def conditions(self, model: Model, concepts: Sequence[Concept]) -> dict[str, Tensor]:
        steered = {c.name: listed(model, [c]) for c in concepts if self.of(c.name).strength}
        return {"": encode_text(model, [""])} | steered

    def combine(self, step: int, eps_p: Tensor, eps: Mapping[str, Tensor], state: Any) -> tuple[Tensor, Any]:
        eps_0, edits = eps[""], {name: self.of(name) for name in eps if name}
        guided = cfg(eps_0, eps_p, self.scale)
        psi = {name: edit.direction(step, eps[name] - eps_0) for name, edit in edits.items()}
        nu = torch.zeros_like(eps_p) if state is None else state
        gamma = sum(psi.values(), self.momentum * nu)
        nu = self.beta * nu + (1 - self.beta) * gamma
        active = [name for name, edit in edits.items() if step >= edit.warm_up]
        if len(active) == len(edits):
            return guided + gamma, nu
        total = sum(edits[name].weight for name in active if not edits[name].over(step))
        return guided + sum((psi[name] for name in active), torch.zeros_like(nu)) / (total or 1.0), nu

"""SLD, safe latent diffusion (Schramowski et al. 2023, arXiv 2211.05105).

ε̃ = ε₀ + s_g (ε_p − ε₀ − γ)          γ only from step δ on
γ = μ (ε_S − ε₀) + s_m ν             ε_S: prediction for the concepts, all in one sentence
μ = min(1, s_S |ε_p − ε_S|)          where ε_p − ε_S < λ (with its sign), else 0; element by element
ν ← β_m ν + (1 − β_m) γ              ν = 0 before the first step; it builds up during the warm-up too

Three predictions a step. As in the released code μ is at most 1, where the paper prints a maximum. Nothing happens
for a prompt that says only the concept itself (ε_p = ε_S, so μ = 0). Deviation: the released code does without γ for
s_S up to 1, here the formula holds for all s_S.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from deleatur.diffusion.encode import encode_text, listed
from deleatur.diffusion.model import Model
from deleatur.guides import Guide
from deleatur.maths.guidance import cfg
from deleatur.records.model import Concept

PRESETS: dict[str, dict[str, float]] = {
    # diffusers' deprecated pipeline has strength 20 for weak; the paper's table says 200.
    "weak": {"warm_up": 15, "strength": 200, "threshold": 0.0, "momentum": 0.0, "beta": 0.0},
    "medium": {"warm_up": 10, "strength": 1000, "threshold": 0.01, "momentum": 0.3, "beta": 0.4},
    "strong": {"warm_up": 7, "strength": 2000, "threshold": 0.025, "momentum": 0.5, "beta": 0.7},
    "max": {"warm_up": 0, "strength": 5000, "threshold": 1.0, "momentum": 0.5, "beta": 0.7},
}
"""For Stable Diffusion and 50 steps: the same numbers mean something else with another sampler."""


class SLD(Guide):
    """Several concepts are one sentence, as in the paper."""

    preset: Literal["weak", "medium", "strong", "max"] = "medium"
    """Where the numbers below come from that are not given."""
    warm_up: int = Field(10, ge=0)
    """δ, sampler steps before it acts: the layout is left to the prompt."""
    strength: float = Field(1000.0, ge=0)
    """s_S, how soon the gate is wide open; 0 switches the guide off."""
    threshold: float = 0.01
    """λ. The larger, the more elements are steered; 1 is all of them."""
    momentum: float = Field(0.3, ge=0)
    """s_m, how much of ν, the running mean of γ, is added."""
    beta: float = Field(0.4, ge=0, lt=1)
    """β_m, the share of ν that stays at each step."""

    @model_validator(mode="before")
    @classmethod
    def fill(cls, given: Any) -> Any:
        """The preset's numbers under those that were given; an unknown preset is left for validation to refuse."""
        named = given.get("preset", "medium") if isinstance(given, dict) else None
        return {**PRESETS.get(named, {}), **given} if isinstance(named, str) else given

    def predictions(self, concepts: int) -> int:
        return 3 if concepts and self.strength else 2

    def starts(self, concept: str) -> int:
        return self.warm_up

    def conditions(self, model: Model, concepts: Sequence[Concept]) -> dict[str, Tensor]:
        plain = {"": encode_text(model, [""])}
        return plain | {"unsafe": listed(model, concepts)} if concepts and self.strength else plain

    def combine(self, step: int, eps_p: Tensor, eps: Mapping[str, Tensor], state: Any) -> tuple[Tensor, Any]:
        eps_0, eps_s = eps[""], eps.get("unsafe")
        if eps_s is None:
            return cfg(eps_0, eps_p, self.scale), state
        nu = torch.zeros_like(eps_p) if state is None else state
        gamma = gate(eps_p - eps_s, self.strength, self.threshold) * (eps_s - eps_0) + self.momentum * nu
        safer = eps_p - gamma if step >= self.warm_up else eps_p
        return cfg(eps_0, safer, self.scale), self.beta * nu + (1 - self.beta) * gamma


def gate(difference: Tensor, s_s: float, lam: float) -> Tensor:
    """μ of ε_p − ε_S: 0 where the prompt already leads away from the concept, up to 1 where it leads towards it."""
    return (s_s * difference.abs()).clamp(max=1) * (difference < lam)

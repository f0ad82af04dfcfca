"""SLD, safe latent diffusion (Schramowski et al. 2023, arXiv 2211.05105).

ε̃ = ε₀ + s_g (ε_p − ε₀ − γ)          γ only from step δ on
γ = μ (ε_S − ε₀) + s_m ν             ε_S: prediction for the concepts, joined in one prompt
μ = min(1, s_S |ε_p − ε_S|)          where ε_p − ε_S < λ (with its sign), else 0; element by element
ν ← β_m ν + (1 − β_m) γ              ν = 0 before the first step; it accumulates during the warm-up too

Three predictions a step. As in the released code, μ is clamped to at most 1; the paper prints max in place of min. It
has no effect on a prompt equal to the concept (ε_p = ε_S, so μ = 0). Deviation: the released code skips γ for s_S ≤ 1,
here the formula holds for all s_S.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from deleatur.diffusion.encode import encode_concept_list, encode_text
from deleatur.diffusion.model import Model
from deleatur.guides import Guide
from deleatur.maths.guidance import cfg
from deleatur.records.model import Concept

PRESETS: dict[str, dict[str, float]] = {
    # diffusers' deprecated pipeline has strength 20 for weak; the paper's table has 200.
    "weak": {
        "warmup_steps": 15,
        "sld_guidance_scale": 200,
        "threshold": 0.0,
        "momentum_scale": 0.0,
        "momentum_beta": 0.0,
    },
    "medium": {
        "warmup_steps": 10,
        "sld_guidance_scale": 1000,
        "threshold": 0.01,
        "momentum_scale": 0.3,
        "momentum_beta": 0.4,
    },
    "strong": {
        "warmup_steps": 7,
        "sld_guidance_scale": 2000,
        "threshold": 0.025,
        "momentum_scale": 0.5,
        "momentum_beta": 0.7,
    },
    "max": {
        "warmup_steps": 0,
        "sld_guidance_scale": 5000,
        "threshold": 1.0,
        "momentum_scale": 0.5,
        "momentum_beta": 0.7,
    },
}
"""For Stable Diffusion and 50 steps; with other samplers the same values have another effect."""


class SLD(Guide):
    """Several concepts are joined in one prompt, as in the paper."""

    preset: Literal["weak", "medium", "strong", "max"] = "medium"
    """Source of the hyperparameters below that are not specified."""
    warmup_steps: int = Field(10, ge=0)
    """δ, sampler steps before the guide acts; the first steps fix the layout."""
    sld_guidance_scale: float = Field(1000.0, ge=0)
    """s_S, how quickly μ saturates at 1; 0 disables the guide."""
    threshold: float = 0.01
    """λ; the larger, the more elements are steered; 1 is nearly all of them."""
    momentum_scale: float = Field(0.3, ge=0)
    """s_m, how much of ν, the running mean of γ, is added."""
    momentum_beta: float = Field(0.4, ge=0, lt=1)
    """β_m, the share of ν that is carried over to the next step."""

    @model_validator(mode="before")
    @classmethod
    def fill_defaults(cls, values: Any) -> Any:
        """Fills unspecified hyperparameters from the preset. An unknown preset is left to field validation."""
        preset = values.get("preset", "medium") if isinstance(values, dict) else None
        return {**PRESETS.get(preset, {}), **values} if isinstance(preset, str) else values

    def predictions_per_step(self, num_concepts: int) -> int:
        return 3 if num_concepts and self.sld_guidance_scale else 2

    def start_step(self, concept: str) -> int:
        return self.warmup_steps

    def conditions(self, model: Model, concepts: Sequence[Concept]) -> dict[str, Tensor]:
        plain = {"": encode_text(model, [""])}
        return (
            plain | {"unsafe": encode_concept_list(model, concepts)} if concepts and self.sld_guidance_scale else plain
        )

    def combine(self, step: int, eps_p: Tensor, eps: Mapping[str, Tensor], state: Any) -> tuple[Tensor, Any]:
        eps_0, eps_s = eps[""], eps.get("unsafe")
        if eps_s is None:
            return cfg(eps_0, eps_p, self.scale), state
        nu = torch.zeros_like(eps_p) if state is None else state
        gamma = (
            safety_scale(eps_p - eps_s, self.sld_guidance_scale, self.threshold) * (eps_s - eps_0)
            + self.momentum_scale * nu
        )
        steered = eps_p - gamma if step >= self.warmup_steps else eps_p
        return cfg(eps_0, steered, self.scale), self.momentum_beta * nu + (1 - self.momentum_beta) * gamma


def safety_scale(difference: Tensor, s_s: float, lam: float) -> Tensor:
    """μ for the difference ε_p − ε_S: 0 where the prompt already points away from the concept, else up to 1."""
    return (s_s * difference.abs()).clamp(max=1) * (difference < lam)

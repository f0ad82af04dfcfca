"""SLD against hand calculations, and identities of the rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from deleatur.diffusion import encode
from deleatur.diffusion.model import Model
from deleatur.diffusion.sample import sample
from deleatur.guides.cfg import CFG
from deleatur.guides.sld import SLD

PUBLISHED = {
    "weak": (15, 200, 0.0, 0.0, 0.0),
    "medium": (10, 1000, 0.01, 0.3, 0.4),
    "strong": (7, 2000, 0.025, 0.5, 0.7),
    "max": (0, 5000, 1.0, 0.5, 0.7),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_are_the_published_ones_and_can_be_overridden(preset: str) -> None:
    guide, overridden = (
        SLD.model_validate({"preset": preset}),
        SLD.model_validate({"preset": preset, "warmup_steps": 2}),
    )
    assert (
        guide.warmup_steps,
        guide.sld_guidance_scale,
        guide.threshold,
        guide.momentum_scale,
        guide.momentum_beta,
    ) == PUBLISHED[preset]
    assert overridden == guide.model_copy(update={"warmup_steps": 2})
    assert SLD.model_validate(guide.model_dump()) == guide, "recorded values are complete"


def test_default_is_medium_and_unknown_presets_are_refused() -> None:
    assert SLD() == SLD(preset="medium")
    for preset in ("maximum", ["max"]):
        with pytest.raises(ValidationError, match="preset"):
            SLD.model_validate({"preset": preset})


def predictions(seed: int = 0, steps: int = 1) -> list[tuple[Tensor, dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(2, 4, 3, 3, generator=g), {n: torch.randn(2, 4, 3, 3, generator=g) for n in ("", "unsafe")})
        for _ in range(steps)
    ]


def test_two_steps_computed_by_hand() -> None:
    """s_g 2, s_S 10, λ 0.05, δ 1, s_m 0.5, β_m 0.4; ε₀ = 0 and ε_S = 0.2 throughout.

    Elements of ε_p − ε_S: −0.3 (μ = min(1, 3) = 1), 0.04 (μ = 0.4), 0.05 (not below λ: 0), −0.05 (μ = 0.5).
    γ₀ = μ · 0.2 = 0.2, 0.08, 0, 0.1 and is not used: warm-up. ν₁ = 0.6 γ₀ = 0.12, 0.048, 0, 0.06.
    γ₁ = γ₀ + 0.5 ν₁ = 0.26, 0.104, 0, 0.13; ε̃₁ = 2 (ε_p − γ₁); ν₂ = 0.4 ν₁ + 0.6 γ₁.
    """
    guide = SLD(scale=2, sld_guidance_scale=10, threshold=0.05, warmup_steps=1, momentum_scale=0.5, momentum_beta=0.4)
    eps_p = torch.tensor([-0.1, 0.24, 0.25, 0.15], dtype=torch.float64)
    eps = {"": torch.zeros_like(eps_p), "unsafe": torch.full_like(eps_p, 0.2)}
    eps["unsafe"][2] = 0.2 - 1e-9  # 0.05 must not round to below λ
    first, nu_1 = guide.combine(0, eps_p, eps, None)
    second, nu_2 = guide.combine(1, eps_p, eps, nu_1)
    values = {"nu_1": [0.12, 0.048, 0, 0.06], "gamma_1": [0.26, 0.104, 0, 0.13], "nu_2": [0.204, 0.0816, 0, 0.102]}
    expected = {n: torch.tensor(v, dtype=torch.float64) for n, v in values.items()}
    assert torch.allclose(first, 2 * eps_p)
    assert torch.allclose(nu_1, expected["nu_1"], atol=1e-7)
    assert torch.allclose(second, 2 * (eps_p - expected["gamma_1"]), atol=1e-7)
    assert torch.allclose(nu_2, expected["nu_2"], atol=1e-7)


def test_warm_up_accumulates_momentum_and_equals_cfg() -> None:
    guide, state = SLD(preset="max", warmup_steps=3), None
    for step, (eps_p, eps) in enumerate(predictions(steps=5)):
        plain, _ = CFG().combine(step, eps_p, eps, None)
        steered, state = guide.combine(step, eps_p, eps, state)
        assert torch.equal(steered, plain) == (step < 3)
        assert state.abs().max() > 0


@pytest.mark.parametrize("hyperparameters", [{"sld_guidance_scale": 0}, {"threshold": -1e9}])
def test_without_strength_or_below_threshold_equals_cfg(hyperparameters: dict[str, Any]) -> None:
    guide, state = SLD.model_validate({"preset": "max", **hyperparameters}), None
    for step, (eps_p, eps) in enumerate(predictions(steps=3)):
        steered, state = guide.combine(step, eps_p, eps, state)
        assert torch.equal(steered, CFG().combine(step, eps_p, eps, None)[0])


def test_prompt_equal_to_the_concept_is_not_steered() -> None:
    [(eps_p, eps)] = predictions()
    steered, _ = SLD(preset="max", momentum_scale=0).combine(0, eps_p, eps | {"unsafe": eps_p}, None)
    assert torch.equal(steered, CFG().combine(0, eps_p, eps, None)[0])


def test_max_preset_subtracts_nearly_the_full_concept_direction() -> None:
    [(eps_p, eps)] = predictions()
    eps_0, eps_s = eps[""] * 0.1, eps["unsafe"] * 0.1
    steered, _ = SLD(preset="max").combine(0, eps_p * 0.1, {"": eps_0, "unsafe": eps_s}, None)
    expected = eps_0 + 7.5 * (eps_p * 0.1 - eps_0 - (eps_s - eps_0))
    assert torch.isclose(steered, expected, atol=1e-4).float().mean() > 0.95


def test_batched_sampling_equals_sampling_alone(model: Model) -> None:
    guide = SLD(preset="max")
    conditions = guide.conditions(model, [encode.concept_from_words(model, "weapon", ["gun"])])
    c = encode.encode_text(model, ["a gun", "a cat", "a dog"])

    def sample_rows(rows: slice) -> list[np.ndarray]:
        seeds = [1, 2, 3][rows]
        return [
            np.asarray(p)
            for p in sample(model, c[rows], seeds, guide=guide, conditions=conditions, steps=4, batch_size=1)
        ]

    together = sample_rows(slice(None))
    assert all(np.array_equal(together[i], sample_rows(slice(i, i + 1))[0]) for i in range(3))

"""SEGA against hand calculations, and identities of the rule."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from deleatur.guides.cfg import CFG
from deleatur.guides.sega import SEGA, ConceptEdit


def predictions(*names: str, steps: int = 1) -> list[tuple[Tensor, dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(0)
    return [
        (torch.randn(2, 4, 8, 8, generator=g), {n: torch.randn(2, 4, 8, 8, generator=g) for n in ("", *names)})
        for _ in range(steps)
    ]


def edit_from_start(**overrides: float) -> ConceptEdit:
    return ConceptEdit.model_validate({"warmup_steps": 0, "threshold": 0, **overrides})


def test_defaults_are_those_of_the_released_pipeline() -> None:
    assert SEGA().model_dump() == {
        "scale": 7.5,
        "edit": {"edit_guidance_scale": 5, "warmup_steps": 10, "cooldown_steps": None, "threshold": 0.9, "weight": 1},
        "concepts": {},
        "momentum_scale": 0.1,
        "momentum_beta": 0.4,
    }


def test_overrides_of_a_concept_are_merged_and_recorded_completely() -> None:
    guide = SEGA.model_validate(
        {"edit": {"warmup_steps": 2, "edit_guidance_scale": 7}, "concepts": {"ink": {"edit_guidance_scale": 3}}}
    )
    assert guide.edit_for("weapon") == ConceptEdit(warmup_steps=2, edit_guidance_scale=7)
    assert guide.edit_for("ink") == ConceptEdit(warmup_steps=2, edit_guidance_scale=3)
    assert guide.start_step("ink") == 2
    assert SEGA.model_validate(guide.model_dump()) == guide
    with pytest.raises(ValidationError, match=r"concepts\.ink\.power"):
        SEGA.model_validate({"concepts": {"ink": {"power": 3}}})


def test_without_concepts_equals_cfg_bit_for_bit() -> None:
    state = None
    for step, (eps_p, eps) in enumerate(predictions(steps=3)):
        steered, state = SEGA().combine(step, eps_p, eps, state)
        assert torch.equal(steered, CFG().combine(step, eps_p, eps, None)[0])


def test_threshold_of_zero_edits_every_position() -> None:
    [(eps_p, eps)] = predictions("a")
    steered, _ = SEGA(edit=edit_from_start(), scale=2).combine(0, eps_p, eps, None)
    expected = eps[""] + 2 * (eps_p - eps[""]) - 5 * (eps["a"] - eps[""])
    assert torch.allclose(steered, expected, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.5, 0.75, 0.9, 0.99])
def test_mask_edits_its_share_of_every_image_and_channel(threshold: float) -> None:
    [(eps_p, eps)] = predictions("a")
    steered, _ = SEGA(edit=edit_from_start(threshold=threshold)).combine(0, eps_p, eps, None)
    difference = steered - CFG().combine(0, eps_p, eps, None)[0]
    edited = (difference != 0).flatten(2)
    assert ((edited.sum(2) - 64 * (1 - threshold)).abs() <= 1).all()
    magnitude = (eps["a"] - eps[""]).abs().flatten(2)
    assert (magnitude.masked_fill(~edited, 9e9).amin(2) >= magnitude.masked_fill(edited, 0).amax(2)).all(), (
        "the largest magnitudes"
    )


def test_momentum_computed_by_hand() -> None:
    """s_e 5, w 2, s_m 0.5, β_m 0.4, ε₀ = 0, ε_j = 0.1: w ψ = −1 at each step.

    γ₀ = −1, ν₁ = −0.6; γ₁ = −1 − 0.3 = −1.3, ν₂ = −0.24 − 0.78 = −1.02. The first step is a warm-up.
    """
    guide = SEGA(scale=3, edit=edit_from_start(weight=2, warmup_steps=1), momentum_scale=0.5, momentum_beta=0.4)
    eps_p = torch.full((1, 1, 2, 2), 0.2)
    eps = {"": torch.zeros_like(eps_p), "a": torch.full_like(eps_p, 0.1)}
    first, nu_1 = guide.combine(0, eps_p, eps, None)
    second, nu_2 = guide.combine(1, eps_p, eps, nu_1)
    for actual, expected in ((first, 0.6), (nu_1, -0.6), (second, 0.6 - 1.3), (nu_2, -1.02)):
        assert torch.allclose(actual, torch.full_like(eps_p, expected), atol=1e-6)


def test_during_partial_warm_up_edits_are_normalised_by_weight_without_momentum() -> None:
    [(eps_p, eps)] = predictions("a", "b", "late")
    edits = {
        "a": edit_from_start(weight=1),
        "b": edit_from_start(weight=3, edit_guidance_scale=2),
        "late": edit_from_start(warmup_steps=5),
    }
    guide = SEGA(concepts=edits)
    state = torch.full_like(eps_p, 100.0)
    steered, _ = guide.combine(4, eps_p, eps, state)
    psi = {n: -edits[n].edit_guidance_scale * (eps[n] - eps[""]) for n in edits}
    plain = CFG().combine(4, eps_p, eps, None)[0]
    assert torch.allclose(steered, plain + psi["a"] / 4 + psi["b"] * 3 / 4, atol=1e-5)
    later, _ = guide.combine(5, eps_p, eps, torch.zeros_like(eps_p))
    assert torch.allclose(later, plain + psi["a"] + 3 * psi["b"] + psi["late"], atol=1e-5), "not normalised"


def test_before_the_warm_up_ends_it_equals_cfg_and_momentum_accumulates() -> None:
    [(eps_p, eps)] = predictions("a")
    steered, nu = SEGA().combine(9, eps_p, eps, None)
    assert torch.equal(steered, CFG().combine(9, eps_p, eps, None)[0])
    assert nu.abs().max() > 0


def test_concept_after_its_cooldown_step_has_no_effect_and_no_weight() -> None:
    [(eps_p, eps)] = predictions("a", "b", "late")
    cooled_down = SEGA(edit=edit_from_start(cooldown_steps=3), momentum_scale=0)
    plain = CFG().combine(3, eps_p, eps, None)[0]
    assert not torch.equal(cooled_down.combine(2, eps_p, eps, None)[0], plain)
    assert torch.equal(cooled_down.combine(3, eps_p, eps, None)[0], plain)
    edits = {"a": edit_from_start(cooldown_steps=3), "b": edit_from_start(), "late": edit_from_start(warmup_steps=5)}
    steered, _ = SEGA(concepts=edits).combine(3, eps_p, eps, None)
    assert torch.allclose(steered, plain - 5 * (eps["b"] - eps[""]), atol=1e-5)
    alone = SEGA(concepts=edits | {"b": edit_from_start(cooldown_steps=1)}).combine(3, eps_p, eps, None)[0]
    assert torch.equal(alone, plain), "no division by a total weight of zero"


def test_edits_of_opposite_sign_cancel() -> None:
    [(eps_p, eps)] = predictions("a")
    eps["again"] = eps["a"]
    guide = SEGA(
        concepts={"a": edit_from_start(edit_guidance_scale=5), "again": edit_from_start(edit_guidance_scale=-5)}
    )
    steered, _ = guide.combine(0, eps_p, eps, None)
    assert torch.equal(steered, CFG().combine(0, eps_p, eps, None)[0])


def test_prompt_equal_to_the_concept_is_steered() -> None:
    [(eps_p, eps)] = predictions()
    steered, _ = SEGA(edit=edit_from_start()).combine(0, eps_p, eps | {"a": eps_p}, None)
    assert torch.allclose(steered, eps[""] + (7.5 - 5) * (eps_p - eps[""]), atol=1e-5)

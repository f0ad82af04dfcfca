"""SEGA against hand calculations, and its own identities."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from deleatur.guides.cfg import CFG
from deleatur.guides.sega import SEGA, Edit


def predictions(*names: str, steps: int = 1) -> list[tuple[Tensor, dict[str, Tensor]]]:
    g = torch.Generator().manual_seed(0)
    return [
        (torch.randn(2, 4, 8, 8, generator=g), {n: torch.randn(2, 4, 8, 8, generator=g) for n in ("", *names)})
        for _ in range(steps)
    ]


def at_once(**numbers: float) -> Edit:
    return Edit.model_validate({"warm_up": 0, "threshold": 0, **numbers})


def test_defaults_are_those_of_the_released_pipeline() -> None:
    assert SEGA().model_dump() == {
        "scale": 7.5,
        "edit": {"strength": 5, "warm_up": 10, "cool_down": None, "threshold": 0.9, "weight": 1},
        "concepts": {},
        "momentum": 0.1,
        "beta": 0.4,
    }


def test_a_concepts_own_numbers_stand_over_the_general_ones_and_are_recorded_whole() -> None:
    guide = SEGA.model_validate({"edit": {"warm_up": 2, "strength": 7}, "concepts": {"ink": {"strength": 3}}})
    assert guide.of("weapon") == Edit(warm_up=2, strength=7)
    assert guide.of("ink") == Edit(warm_up=2, strength=3)
    assert guide.starts("ink") == 2
    assert SEGA.model_validate(guide.model_dump()) == guide
    with pytest.raises(ValidationError, match=r"concepts\.ink\.power"):
        SEGA.model_validate({"concepts": {"ink": {"power": 3}}})


def test_no_concepts_is_plain_guidance_to_the_bit() -> None:
    state = None
    for step, (eps_p, eps) in enumerate(predictions(steps=3)):
        steered, state = SEGA().combine(step, eps_p, eps, state)
        assert torch.equal(steered, CFG().combine(step, eps_p, eps, None)[0])


def test_a_threshold_of_zero_keeps_everything() -> None:
    [(eps_p, eps)] = predictions("a")
    steered, _ = SEGA(edit=at_once(), scale=2).combine(0, eps_p, eps, None)
    whole = eps[""] + 2 * (eps_p - eps[""]) - 5 * (eps["a"] - eps[""])
    assert torch.allclose(steered, whole, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.5, 0.75, 0.9, 0.99])
def test_the_mask_keeps_its_share_of_every_picture_and_channel(threshold: float) -> None:
    [(eps_p, eps)] = predictions("a")
    steered, _ = SEGA(edit=at_once(threshold=threshold)).combine(0, eps_p, eps, None)
    apart = steered - CFG().combine(0, eps_p, eps, None)[0]
    kept = (apart != 0).flatten(2)
    assert ((kept.sum(2) - 64 * (1 - threshold)).abs() <= 1).all()
    size = (eps["a"] - eps[""]).abs().flatten(2)
    assert (size.masked_fill(~kept, 9e9).amin(2) >= size.masked_fill(kept, 0).amax(2)).all(), "the largest ones"


def test_momentum_by_hand() -> None:
    """s_e 5, w 2, s_m 0.5, β_m 0.4, ε₀ = 0, ε_j = 0.1: w ψ = −1 at each step.

    γ₀ = −1, ν₁ = −0.6; γ₁ = −1 − 0.3 = −1.3, ν₂ = −0.24 − 0.78 = −1.02. The first step is a warm-up.
    """
    guide = SEGA(scale=3, edit=at_once(weight=2, warm_up=1), momentum=0.5, beta=0.4)
    eps_p = torch.full((1, 1, 2, 2), 0.2)
    eps = {"": torch.zeros_like(eps_p), "a": torch.full_like(eps_p, 0.1)}
    first, nu_1 = guide.combine(0, eps_p, eps, None)
    second, nu_2 = guide.combine(1, eps_p, eps, nu_1)
    for got, hand in ((first, 0.6), (nu_1, -0.6), (second, 0.6 - 1.3), (nu_2, -1.02)):
        assert torch.allclose(got, torch.full_like(eps_p, hand), atol=1e-6)


def test_while_some_concepts_wait_the_others_share_by_weight_without_momentum() -> None:
    [(eps_p, eps)] = predictions("a", "b", "late")
    edits = {"a": at_once(weight=1), "b": at_once(weight=3, strength=2), "late": at_once(warm_up=5)}
    guide = SEGA(concepts=edits)
    state = torch.full_like(eps_p, 100.0)
    steered, _ = guide.combine(4, eps_p, eps, state)
    psi = {n: -edits[n].strength * (eps[n] - eps[""]) for n in edits}
    plain = CFG().combine(4, eps_p, eps, None)[0]
    assert torch.allclose(steered, plain + psi["a"] / 4 + psi["b"] * 3 / 4, atol=1e-5)
    later, _ = guide.combine(5, eps_p, eps, torch.zeros_like(eps_p))
    assert torch.allclose(later, plain + psi["a"] + 3 * psi["b"] + psi["late"], atol=1e-5), "not normalised"


def test_before_all_warm_ups_it_is_plain_guidance_and_the_momentum_grows() -> None:
    [(eps_p, eps)] = predictions("a")
    steered, nu = SEGA().combine(9, eps_p, eps, None)
    assert torch.equal(steered, CFG().combine(9, eps_p, eps, None)[0])
    assert nu.abs().max() > 0


def test_a_concept_past_its_time_acts_no_more_and_weighs_nothing() -> None:
    [(eps_p, eps)] = predictions("a", "b", "late")
    over = SEGA(edit=at_once(cool_down=3), momentum=0)
    plain = CFG().combine(3, eps_p, eps, None)[0]
    assert not torch.equal(over.combine(2, eps_p, eps, None)[0], plain)
    assert torch.equal(over.combine(3, eps_p, eps, None)[0], plain)
    edits = {"a": at_once(cool_down=3), "b": at_once(), "late": at_once(warm_up=5)}
    steered, _ = SEGA(concepts=edits).combine(3, eps_p, eps, None)
    assert torch.allclose(steered, plain - 5 * (eps["b"] - eps[""]), atol=1e-5)
    alone = SEGA(concepts=edits | {"b": at_once(cool_down=1)}).combine(3, eps_p, eps, None)[0]
    assert torch.equal(alone, plain), "no weight left to share is no division by zero"


def test_equal_strengths_of_opposite_sign_cancel() -> None:
    [(eps_p, eps)] = predictions("a")
    eps["again"] = eps["a"]
    guide = SEGA(concepts={"a": at_once(strength=5), "again": at_once(strength=-5)})
    steered, _ = guide.combine(0, eps_p, eps, None)
    assert torch.equal(steered, CFG().combine(0, eps_p, eps, None)[0])


def test_a_prompt_that_is_the_concept_is_still_steered() -> None:
    [(eps_p, eps)] = predictions()
    steered, _ = SEGA(edit=at_once()).combine(0, eps_p, eps | {"a": eps_p}, None)
    assert torch.allclose(steered, eps[""] + (7.5 - 5) * (eps_p - eps[""]), atol=1e-5)

"""The contract of guides: every installed one keeps what the base class promises."""

from __future__ import annotations

from typing import Any

import network_calls
import pytest
import torch
from plugin_examples import instantiate

from deleatur import plugins
from deleatur.diffusion import encode
from deleatur.diffusion.model import Model
from deleatur.diffusion.overlay import edited_weights
from deleatur.diffusion.sample import denoise, initial_noise, sample
from deleatur.guides import Guide
from deleatur.records.model import Concept, Delta, SoftToken


def words_and_token(model: Model) -> list[Concept]:
    """One concept in words, one in soft tokens."""
    rows = torch.stack([encode.word_embedding(model, "sword")[None] + 1, encode.word_embedding(model, "cat")[None] - 1])
    return [
        encode.concept_from_words(model, "weapon", ["gun"]),
        encode.concept_from_token(model, SoftToken("ink", rows, {})),
    ]


def guided_latents(model: Model, guide: Guide, concepts: list[Concept], delta: Delta | None = None) -> torch.Tensor:
    c, conditions = encode.encode_text(model, ["a dog", "a gun", "a cat"]), guide.conditions(model, concepts)
    weights = edited_weights(model, delta) if delta else {}
    return denoise(model, initial_noise(model, [1, 2, 3]), c, conditions, guide, 12, weights)


@pytest.mark.parametrize("name", plugins.names("guides"))
def test_a_guide_has_no_hidden_state_and_treats_rows_independently(model: Model, name: str) -> None:
    guide: Guide = instantiate("guides", name, Guide)
    conditions = guide.conditions(model, words_and_token(model))
    assert all(c.shape[1:] == encode.encode_text(model, [""]).shape[1:] for c in conditions.values())
    g = torch.Generator().manual_seed(0)
    predictions = [
        (torch.randn(3, 4, 4, 4, generator=g), {n: torch.randn(3, 4, 4, 4, generator=g) for n in conditions})
        for _ in range(14)
    ]

    def combine(rows: slice) -> list[torch.Tensor]:
        state, out = None, []
        for step, (eps_p, eps) in enumerate(predictions):
            combined, state = guide.combine(step, eps_p[rows], {n: e[rows] for n, e in eps.items()}, state)
            out.append(combined)
        return out

    complete = combine(slice(None))
    assert all(torch.equal(a, b) for a, b in zip(complete, combine(slice(None)), strict=True)), "no hidden state"
    for i in range(3):
        alone = combine(slice(i, i + 1))
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(complete, alone, strict=True)), "rows are independent"


@pytest.mark.parametrize("k", range(3))
@pytest.mark.parametrize("name", plugins.names("guides"))
def test_a_guides_predictions_do_not_depend_on_the_number_of_words(model: Model, name: str, k: int) -> None:
    guide: Guide = instantiate("guides", name, Guide)
    concepts = [encode.concept_from_words(model, f"c{i}", ["gun", "sword", "cat"]) for i in range(k)]
    c, conditions = encode.encode_text(model, ["a dog"]), guide.conditions(model, concepts)
    with network_calls.rows() as rows, network_calls.calls() as calls:
        sample(model, c, [1], guide=guide, conditions=conditions, steps=3, batch_size=1)
    assert (calls[network_calls.UNET], rows["forward"]) == (3, 3 * guide.predictions_per_step(k)), "one call per step"


NEUTRAL: dict[str, dict[str, Any]] = {"sld": {"sld_guidance_scale": 0}, "sega": {"edit": {"edit_guidance_scale": 0}}}
"""Hyperparameters that switch a guide off. The others are off without a concept only, or are plain guidance."""


@pytest.mark.parametrize("name", plugins.names("guides"))
def test_a_guide_without_a_concept_or_switched_off_is_plain_guidance(model: Model, name: str) -> None:
    plain = guided_latents(model, instantiate("guides", "cfg", Guide), [])
    assert torch.equal(plain, guided_latents(model, instantiate("guides", name, Guide), []))
    if name in NEUTRAL:
        off: Guide = instantiate("guides", name, Guide, **NEUTRAL[name])
        assert torch.equal(plain, guided_latents(model, off, words_and_token(model)))


@pytest.mark.parametrize("name", [n for n in plugins.names("guides") if n != "cfg"])
def test_a_guide_steers_away_from_words_and_from_tokens_on_any_weights(model: Model, name: str) -> None:
    guide, plain = instantiate("guides", name, Guide), instantiate("guides", "cfg", Guide)
    changed = {n: 0.1 * torch.ones_like(p) for n, p in model.unet.named_parameters() if "attn2" in n}
    delta = Delta(changed, model.unet_digest, "test", {}, ())
    for concept in words_and_token(model):
        for weights in (None, delta):
            unguided = guided_latents(model, plain, [concept], weights)
            assert not torch.equal(unguided, guided_latents(model, guide, [concept], weights))
    concepts = words_and_token(model)
    assert not torch.equal(guided_latents(model, guide, concepts), guided_latents(model, guide, concepts, delta))

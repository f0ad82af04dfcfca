"""Negative prompts against diffusers, and identities of the rule."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from deleatur.diffusion import encode
from deleatur.diffusion.model import Model
from deleatur.diffusion.sample import denoise, initial_noise
from deleatur.guides import Guide
from deleatur.guides.cfg import CFG
from deleatur.guides.negative import Negative
from deleatur.records.model import Concept


def sample_latents(model: Model, guide: Guide, concepts: list[Concept], prompt: str = "a cat") -> Tensor:
    c, conditions = encode.encode_text(model, [prompt]), guide.conditions(model, concepts)
    return denoise(model, initial_noise(model, [7]), c, conditions, guide, 4, {})


@pytest.mark.parametrize("words", [["gun"], ["gun", "sword"]])
def test_equals_diffusers_with_a_negative_prompt(model: Model, words: list[str]) -> None:
    parts = {**tiny.parts(), "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    shared = {
        "num_inference_steps": 4,
        "guidance_scale": 7.5,
        "latents": initial_noise(model, [7]),
        "output_type": "latent",
    }
    reference = pipe("a cat", negative_prompt=", ".join(words), **shared).images
    ours = sample_latents(model, Negative(), [encode.concept_from_words(model, "weapon", words)])
    assert torch.allclose(ours, reference, atol=1e-5)
    assert not torch.allclose(ours, sample_latents(model, CFG(), []), atol=1e-3)


def test_empty_negative_prompt_equals_cfg_bit_for_bit(model: Model) -> None:
    empty = encode.concept_from_words(model, "nothing", [""])
    assert torch.equal(sample_latents(model, Negative(), [empty]), sample_latents(model, CFG(), []))


def test_prompt_as_negative_prompt_gives_the_conditional_trajectory(model: Model) -> None:
    same = encode.concept_from_words(model, "gun", ["gun"])
    assert torch.allclose(
        sample_latents(model, Negative(), [same], "gun"), sample_latents(model, CFG(scale=1.0), [], "gun"), atol=1e-5
    )


def test_prediction_is_linear_in_the_scale() -> None:
    eps_n, eps_p = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    zero, one, five = (Negative(scale=s).combine(0, eps_p, {"negative": eps_n}, None)[0] for s in (0, 1, 5))
    assert torch.equal(zero, eps_n)
    assert torch.allclose(one, eps_p, atol=1e-6)
    assert torch.allclose(five - zero, 5 * (one - zero), atol=1e-5)

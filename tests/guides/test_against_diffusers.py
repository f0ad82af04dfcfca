"""Latents equal those of the authors' pipelines from the same noise, where the installed diffusers still has them."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import tiny
from torch import Tensor

from deleatur.diffusion import encode
from deleatur.diffusion.model import Model
from deleatur.diffusion.sample import denoise, initial_noise
from deleatur.guides import Guide
from deleatur.guides.cfg import CFG
from deleatur.guides.sega import SEGA
from deleatur.guides.sld import SLD

# The pipelines emit deprecation warnings.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Safety checker")

STEPS, PROMPT = 8, "a cat in a picture"


def pipeline(name: str) -> Any:
    pipeline_class = getattr(diffusers, name, None)
    if pipeline_class is None:
        pytest.skip(f"diffusers {diffusers.__version__} no longer has {name}")
    parts = {**tiny.parts(), "safety_checker": None, "feature_extractor": None}
    pipe = pipeline_class(**parts, requires_safety_checker=False, **({"image_encoder": None} if "Safe" in name else {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def our_latents(model: Model, guide: Guide, words: dict[str, str]) -> Tensor:
    concepts = [encode.concept_from_words(model, name, [text]) for name, text in words.items()]
    c, conditions = encode.encode_text(model, [PROMPT]), guide.conditions(model, concepts)
    return denoise(model, initial_noise(model, [3]), c, conditions, guide, STEPS, {})


def reference_latents(model: Model, name: str, **arguments: Any) -> Tensor:
    """The latents after the last step."""
    pipeline_class = getattr(diffusers, name, None)
    if pipeline_class is None:
        pytest.skip(f"diffusers {diffusers.__version__} no longer has {name}")
    parts = {**tiny.parts(), "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = pipeline_class(**parts)
    pipe.set_progress_bar_config(disable=True)
    if "Safe" in name:
        pipe.safety_concept = arguments.pop("safety_concept")
    latents: list[Tensor] = []
    shared = {
        "num_inference_steps": STEPS,
        "guidance_scale": 7.5,
        "latents": initial_noise(model, [3]),
        "output_type": "np",
    }
    pipe(PROMPT, callback=lambda step, t, z: latents.append(z.clone()), callback_steps=1, **shared, **arguments)
    return latents[-1]


def assert_equal(model: Model, ours: Tensor, reference: Tensor) -> None:
    effect = (ours - our_latents(model, CFG(), {})).abs().max()
    assert effect > 0.01
    assert (ours - reference).abs().max() < effect / 500  # a guidance scale of 5000 amplifies rounding errors


@pytest.mark.parametrize("warm_up", [0, 3])
@pytest.mark.parametrize(
    "hyperparameters",
    [
        {"sld_guidance_scale": 2.0, "threshold": 0.01, "momentum_scale": 0.3, "momentum_beta": 0.4},
        {"preset": "max"},
        {"preset": "strong", "sld_guidance_scale": 20.0},
    ],
)
def test_sld(model: Model, hyperparameters: dict[str, Any], warm_up: int) -> None:
    guide = SLD.model_validate({**hyperparameters, "warmup_steps": warm_up})
    reference = reference_latents(
        model,
        "StableDiffusionPipelineSafe",
        safety_concept="gun, sword",
        sld_guidance_scale=guide.sld_guidance_scale,
        sld_warmup_steps=guide.warmup_steps,
        sld_threshold=guide.threshold,
        sld_momentum_scale=guide.momentum_scale,
        sld_mom_beta=guide.momentum_beta,
    )
    assert_equal(model, our_latents(model, guide, {"weapon": "gun, sword"}), reference)


@pytest.mark.parametrize(
    ("edit", "second"),
    [
        ({"edit_guidance_scale": 4.0, "warmup_steps": 0, "threshold": 0.5}, None),
        ({"edit_guidance_scale": 5.0, "warmup_steps": 3, "threshold": 0.9}, None),
        ({"edit_guidance_scale": 5.0, "warmup_steps": 1, "threshold": 0.75, "cooldown_steps": 5}, None),
        (
            {"edit_guidance_scale": 4.0, "warmup_steps": 0, "threshold": 0.5},
            {"edit_guidance_scale": -3.0, "warmup_steps": 4, "weight": 2.0},
        ),
        ({"edit_guidance_scale": 4.0, "warmup_steps": 2, "threshold": 0.9}, {"threshold": 0.6, "cooldown_steps": 6}),
    ],
)
def test_sega(model: Model, edit: dict[str, Any], second: dict[str, Any] | None) -> None:
    words = {"weapon": "gun", **({"style": "ink"} if second else {})}
    guide = SEGA.model_validate(
        {"edit": edit, "concepts": {"style": second or {}}, "momentum_scale": 0.3, "momentum_beta": 0.6}
    )
    edits = [guide.edit_for(name) for name in words]
    reference = reference_latents(
        model,
        "SemanticStableDiffusionPipeline",
        editing_prompt=list(words.values()),
        reverse_editing_direction=[e.edit_guidance_scale > 0 for e in edits],
        edit_guidance_scale=[abs(e.edit_guidance_scale) for e in edits],
        edit_warmup_steps=[e.warmup_steps for e in edits],
        edit_cooldown_steps=[STEPS + 1 if e.cooldown_steps is None else e.cooldown_steps for e in edits],
        edit_threshold=[e.threshold for e in edits],
        edit_weights=[e.weight for e in edits],
        edit_momentum_scale=guide.momentum_scale,
        edit_mom_beta=guide.momentum_beta,
    )
    assert_equal(model, our_latents(model, guide, words), reference)

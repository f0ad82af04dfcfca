"""The same latents as the authors' pipelines, from the same noise, where the installed diffusers still has them."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import tiny
from torch import Tensor

from deleatur.diffusion import encode
from deleatur.diffusion.model import Model
from deleatur.diffusion.sample import denoise, noise
from deleatur.guides import Guide
from deleatur.guides.cfg import CFG
from deleatur.guides.sega import SEGA
from deleatur.guides.sld import SLD

# The pipelines warn of their own deprecation.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Safety checker")

STEPS, PROMPT = 8, "a cat in a picture"


def pipeline(name: str) -> Any:
    found = getattr(diffusers, name, None)
    if found is None:
        pytest.skip(f"diffusers {diffusers.__version__} no longer has {name}")
    parts = {**tiny.parts(), "safety_checker": None, "feature_extractor": None}
    pipe = found(**parts, requires_safety_checker=False, **({"image_encoder": None} if "Safe" in name else {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(model: Model, guide: Guide, words: dict[str, str]) -> Tensor:
    concepts = [encode.concept_from_words(model, name, [text]) for name, text in words.items()]
    c, conditions = encode.encode_text(model, [PROMPT]), guide.conditions(model, concepts)
    return denoise(model, noise(model, [3]), c, conditions, guide, STEPS, {})


def theirs(model: Model, name: str, **numbers: Any) -> Tensor:
    """The latents after the last step."""
    found = getattr(diffusers, name, None)
    if found is None:
        pytest.skip(f"diffusers {diffusers.__version__} no longer has {name}")
    parts = {**tiny.parts(), "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = found(**parts)
    pipe.set_progress_bar_config(disable=True)
    if "Safe" in name:
        pipe.safety_concept = numbers.pop("safety_concept")
    seen: list[Tensor] = []
    shared = {"num_inference_steps": STEPS, "guidance_scale": 7.5, "latents": noise(model, [3]), "output_type": "np"}
    pipe(PROMPT, callback=lambda step, t, z: seen.append(z.clone()), callback_steps=1, **shared, **numbers)
    return seen[-1]


def equal(model: Model, own: Tensor, other: Tensor) -> None:
    effect = (own - ours(model, CFG(), {})).abs().max()
    assert effect > 0.01
    assert (own - other).abs().max() < effect / 500  # a strength of 5000 makes much of a last bit


@pytest.mark.parametrize("warm_up", [0, 3])
@pytest.mark.parametrize(
    "numbers",
    [
        {"strength": 2.0, "threshold": 0.01, "momentum": 0.3, "beta": 0.4},
        {"preset": "max"},
        {"preset": "strong", "strength": 20.0},
    ],
)
def test_sld(model: Model, numbers: dict[str, Any], warm_up: int) -> None:
    guide = SLD.model_validate({**numbers, "warm_up": warm_up})
    other = theirs(
        model,
        "StableDiffusionPipelineSafe",
        safety_concept="gun, sword",
        sld_guidance_scale=guide.strength,
        sld_warmup_steps=guide.warm_up,
        sld_threshold=guide.threshold,
        sld_momentum_scale=guide.momentum,
        sld_mom_beta=guide.beta,
    )
    equal(model, ours(model, guide, {"weapon": "gun, sword"}), other)


@pytest.mark.parametrize(
    ("edit", "second"),
    [
        ({"strength": 4.0, "warm_up": 0, "threshold": 0.5}, None),
        ({"strength": 5.0, "warm_up": 3, "threshold": 0.9}, None),
        ({"strength": 5.0, "warm_up": 1, "threshold": 0.75, "cool_down": 5}, None),
        ({"strength": 4.0, "warm_up": 0, "threshold": 0.5}, {"strength": -3.0, "warm_up": 4, "weight": 2.0}),
        ({"strength": 4.0, "warm_up": 2, "threshold": 0.9}, {"threshold": 0.6, "cool_down": 6}),
    ],
)
def test_sega(model: Model, edit: dict[str, Any], second: dict[str, Any] | None) -> None:
    words = {"weapon": "gun", **({"style": "ink"} if second else {})}
    guide = SEGA.model_validate({"edit": edit, "concepts": {"style": second or {}}, "momentum": 0.3, "beta": 0.6})
    edits = [guide.of(name) for name in words]
    other = theirs(
        model,
        "SemanticStableDiffusionPipeline",
        editing_prompt=list(words.values()),
        reverse_editing_direction=[e.strength > 0 for e in edits],
        edit_guidance_scale=[abs(e.strength) for e in edits],
        edit_warmup_steps=[e.warm_up for e in edits],
        edit_cooldown_steps=[STEPS + 1 if e.cool_down is None else e.cool_down for e in edits],
        edit_threshold=[e.threshold for e in edits],
        edit_weights=[e.weight for e in edits],
        edit_momentum_scale=guide.momentum,
        edit_mom_beta=guide.beta,
    )
    equal(model, ours(model, guide, words), other)

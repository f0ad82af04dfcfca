from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deleatur.artifacts import reward_heads
from deleatur.config.settings import Settings
from deleatur.diffusion import encode
from deleatur.diffusion.clip import load_clip
from deleatur.diffusion.model import load
from deleatur.errors import ModelError
from deleatur.evaluation.probe import EVAL_PROMPTS, sample_states, validation_probe

ROOT = Path(__file__).parents[2]


def test_a_destroyed_model_scores_as_blank_images_and_a_broken_base_model_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Early stopping then returns to the best evaluation; without a base model there is nothing to return to."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(reward_heads, "load_head", lambda *_: lambda features: torch.zeros(len(features)))
    settings = Settings.load(Path("params.yaml"))
    settings = settings.model_copy(update={"sample": settings.sample.model_copy(update={"steps": 1})})
    model, clip = load(settings.base.model, device="cpu"), load_clip(settings.reward.clip, "cpu")
    concepts = [encode.concept_from_words(model, "weapon", ["gun"])]
    probe = validation_probe(settings, model, clip, concepts, None)
    destroyed = probe({n: p * 1e30 for n, p in model.unet.named_parameters()})
    assert (destroyed.concept, destroyed.contrast) == (1.0, 0.0)
    assert probe({}).contrast > 0
    next(model.unet.parameters()).fill_(float("nan"))
    with pytest.raises(ModelError, match="expected finite values"):
        probe({})


def test_an_evaluation_takes_all_of_a_few_states_and_a_fixed_random_sample_of_many() -> None:
    few, many = (torch.arange(float(n)).reshape(n, 1, 1) for n in (EVAL_PROMPTS - 1, 96))
    assert torch.equal(sample_states(few, 1).sort(0).values, few)
    sampled = sample_states(many, 2)
    assert torch.equal(sampled, sample_states(many, 2))
    assert len(sampled.unique()) == len(sampled) == EVAL_PROMPTS
    # 16 tokens in 6 templates: a stride would see some templates never.
    assert set((sampled.flatten() % 6).tolist()) == set(range(6))

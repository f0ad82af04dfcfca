"""Evaluations during training: the validation probe of an eraser, and the token evaluator of an inversion."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deleatur.artifacts import prompts, reward_heads
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.diffusion import encode
from deleatur.diffusion.clip import Clip
from deleatur.diffusion.model import Model
from deleatur.diffusion.predict import Weights
from deleatur.diffusion.sample import sample
from deleatur.errors import ModelError
from deleatur.feedback.reward import RewardHead
from deleatur.maths.distances import cosine_similarity
from deleatur.maths.seeds import derive, generator
from deleatur.records.model import Concept
from deleatur.training.early_stopping import Evaluation, Probe
from deleatur.training.textual_inversion import TokenEvaluator

EVAL_PROMPTS = 32
"""At most so many prompts of each kind per evaluation: few enough to be cheap, and fixed, so that evaluations are
comparable. The kinds: prompts of a concept, its own words or tokens in their templates, and preserved prompts."""

ConceptClassifier = Callable[[list[Image.Image]], Tensor]
"""n images → (n,) bool: whether the concept is visible."""

IMAGES_PER_TOKEN = 4
"""Images sampled from each bare token per evaluation of an inversion."""


def validation_probe(
    settings: Settings,
    model: Model,
    clip: Clip,
    concepts: Sequence[Concept],
    one_step: int | None,
) -> Probe:
    """Samples concept prompts, the concept's own words or tokens, and preserved prompts, always from the same noise,
    and scores them with r_ψ (for a concept without ratings, with its detector) and with CLIP. Prompts are those of the
    dev split only, never those of the report.
    """
    guide = methods.guide(settings)
    conditions = guide.conditions(model, concepts)
    concept_states: list[tuple[ConceptClassifier, Tensor]] = []
    for concept in concepts:
        texts = prompts.validation_prompts(settings, concept.name, EVAL_PROMPTS)
        states = torch.cat([encode.encode_text(model, texts), sample_states(concept.states, settings.seed)])
        concept_states.append((concept_classifier(settings, clip, concept.name), states))
    preserved_texts = prompts.preserved_validation_prompts(settings, EVAL_PROMPTS)
    preserved_states = encode.encode_text(model, preserved_texts)
    text_features = clip.embed_texts(preserved_texts)

    def sample_images(states: Tensor, purpose: str, weights: Weights) -> list[Image.Image]:
        return sample(
            model,
            states,
            # These labels select the noise, so they keep their first names: "look" is an evaluation.
            [derive(settings.seed, "erase", "look", purpose, i) for i in range(len(states))],
            guide=guide,
            conditions=conditions,
            steps=settings.sample.steps,
            weights=weights,
            one_step=one_step if weights else None,
            batch_size=settings.sample.batch_size,
        )

    def probe(weights: Weights) -> Evaluation:
        try:
            return evaluate(weights)
        except ModelError:  # NaN or infinity in latents or pixels
            if not weights:
                raise
            # Training destroyed the model. Zero contrast, as of blank images, makes early stopping return an earlier
            # evaluation's weights.
            return Evaluation(concept=1.0, preserved=0.0, contrast=0.0)

    def evaluate(weights: Weights) -> Evaluation:
        shown = [shows_concept(sample_images(states, "concept", weights)) for shows_concept, states in concept_states]
        images = sample_images(preserved_states, "kept", weights)
        similarity = cosine_similarity(clip.embed_images(images), text_features)
        return Evaluation(
            concept=float(torch.cat(shown).float().mean()),
            preserved=float(similarity.mean()),
            contrast=float(np.mean([contrast(image) for image in images])),
            preserved_by_prompt=similarity.tolist(),
        )

    return probe


def sample_states(states: Tensor, seed: int) -> Tensor:
    """At most EVAL_PROMPTS rows of (n, L, d), a random sample without replacement: tokens times templates are many."""
    return states[torch.randperm(len(states), generator=generator(seed, "erase", "evaluation"))[:EVAL_PROMPTS]]


def concept_classifier(settings: Settings, clip: Clip, name: str) -> ConceptClassifier:
    """The concept's reward head, fitted to its ratings; for a concept without ratings, its detector."""
    if reward_heads.is_trained(settings, name):
        head = reward_heads.load_head(settings, name, "train")
        return lambda images: reward_heads.shows_concept(head, clip.embed_images(images))
    detection = settings.concepts[name].detection
    detector = methods.detectors(settings)[detection.detector].load()
    counts = np.isin(detector.labels, detection.labels)
    return lambda images: torch.from_numpy(counts[detector.detect(images).argmax(1)])


def token_evaluator(settings: Settings, model: Model, clip: Clip, head: RewardHead, name: str) -> TokenEvaluator:
    """Samples images from each bare token, always from the same noise, and returns their mean r_ψ per token."""
    guide = methods.guide(settings)
    seeds = [derive(settings.seed, "invert", "look", name, i) for i in range(IMAGES_PER_TOKEN)]
    conditions = guide.conditions(model, [])  # no concept to steer away from: the token itself is under test

    def evaluate(vectors: Tensor) -> list[float]:
        with torch.no_grad():
            states = encode.encode(model, [(rows,) for rows in vectors]).states
        images = sample(
            model,
            states.repeat_interleave(IMAGES_PER_TOKEN, 0),
            seeds * len(vectors),
            guide=guide,
            conditions=conditions,
            steps=settings.sample.steps,
            batch_size=settings.sample.batch_size,
        )
        rewards: list[float] = head(clip.embed_images(images)).reshape(-1, IMAGES_PER_TOKEN).mean(1).tolist()
        return rewards

    return evaluate


def contrast(image: Image.Image) -> float:
    """Standard deviation of the pixels of an 8 × 8 thumbnail, 0 … 127: near 0 for a blank image, and for noise too."""
    return float(np.asarray(image.resize((8, 8), Image.Resampling.BOX), np.float64).std((0, 1)).mean())

"""Soft tokens of the stage `invert`, and concepts as erasers and guides take them."""

from __future__ import annotations

from deleatur.config.settings import Settings
from deleatur.diffusion import encode
from deleatur.diffusion.model import Model
from deleatur.records.model import Concept, SoftToken
from deleatur.storage import tensors


def is_learned(settings: Settings, concept: str) -> bool:
    """Whether there are tokens of the concept: `invert` skips concepts that nobody rated."""
    return (settings.paths.tokens / concept).is_dir()


def load_token(settings: Settings, concept: str) -> SoftToken:
    """The soft tokens of a concept. Raises DataError if there are none."""
    return tensors.load_token(settings.paths.tokens / concept)


def load_concept(settings: Settings, model: Model, name: str) -> Concept:
    """The concept, specified by its soft tokens or by its words as `erase.source` selects."""
    spec = settings.concepts[name]
    if settings.erase.source == "words":
        return encode.concept_from_words(model, name, spec.words, spec.prompt_templates)
    return encode.concept_from_token(model, load_token(settings, name), spec.prompt_templates)

"""What is sampled, and everything that determines an image."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

Variant = Literal["base", "champion", "candidate"]
"""Which model generated an image: the base model, the released one, or the one under evaluation."""

Role = Literal["concept", "word", "token", "attack", "neighbour", "keep", "unseen"]
"""Purpose of a prompt. word, token: the concept's own words and soft tokens alone; the others come from files."""


@dataclass(frozen=True)
class Prompt:
    """One prompt of the evaluation set."""

    id: str
    text: str
    role: Role
    label: str
    """Class that a classifier should predict for the image."""
    concept: str = ""
    """For the roles concept, word, token and attack: the concept that the prompt requests."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines an image. Its variant, its prompt's role and the rest of its batch do not."""

    pipeline: str
    """Digest of the base model on disk: every network, its configuration, tokenizer and scheduler."""
    precision: str
    weights: str
    """Digest of the UNet tensors that replace the base model's."""
    states: str
    """Digest of the prompt's text-encoder states."""
    conditions: str
    """Digest of the text-encoder states that the guide uses beside the prompt."""
    guidance: str
    """The guide and its hyperparameters, as JSON."""
    steps: int
    noise_seed: int
    code: str
    """Digest of the source code and library versions that generate images."""

    @property
    def key(self) -> str:
        """The image's name: SHA-256 of the recipe."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Sample:
    """One image of the evaluation."""

    variant: Variant
    prompt: Prompt
    index: int
    """The image's number among those of its prompt."""
    recipe: Recipe

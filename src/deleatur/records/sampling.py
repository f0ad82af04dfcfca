"""What is sampled, and everything that decides an image."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # torch takes seconds to import; a verdict is read without it
    pass


Side = Literal["base", "champion", "candidate"]


Role = Literal["concept", "word", "token", "attack", "neighbour", "keep", "unseen"]
"""What a prompt is there for. word, token: the concept's own words and soft tokens, alone; others come from files."""


@dataclass(frozen=True)
class Prompt:
    """One line of the evaluation set."""

    id: str
    text: str
    role: Role
    label: str
    """What a detector should find in the picture: a class name of the judge."""
    concept: str = ""
    """For the roles concept, word, token and attack: which concept it asks for."""


@dataclass(frozen=True)
class Recipe:
    """All that decides a picture. Which side or prompt it is drawn for does not, nor what is drawn beside it."""

    pipeline: str
    """Digest of the base model as it lies on disk: every network, its configuration, tokenizer and scheduler."""
    precision: str
    weights: str
    """Digest of the UNet's tensors that were laid over the base model's."""
    states: str
    """Digest of the prompt as the text encoder gives it."""
    conditions: str
    """Digest of the sentences that the guide runs beside the prompt, in the same form."""
    guidance: str
    """The guide and its numbers, as JSON."""
    steps: int
    noise_seed: int
    code: str
    """Digest of the sources and of the versions of the libraries that drew it."""

    @property
    def key(self) -> str:
        """The picture's name."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Shot:
    """One picture of the evaluation."""

    side: Side
    prompt: Prompt
    index: int
    """The picture's number among those of its prompt."""
    recipe: Recipe

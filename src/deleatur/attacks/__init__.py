"""Shelf: what tries to bring the concept back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.diffusion.predict import Weights
from deleatur.training.cost import Work
from deleatur.training.optimizer_state import Saved
from deleatur.training.textual_inversion import Progress, Templates

Access = Literal["prompts", "text_encoder", "white_box", "original_model"]


@dataclass(frozen=True)
class AttackTarget:
    """What is attacked: a model with the erased weights laid over it, and what the attacker has of the concept."""

    model: Model
    weights: Weights
    concept: str
    latents: Tensor
    """(n, C, H, W) latents of pictures that show the concept."""
    initial: Tensor
    """(d,) embedding row the attacker starts from."""
    templates: Sequence[Templates]
    """(n) sentences that a soft prompt may stand in for each picture."""


@dataclass(frozen=True)
class AttackResult:
    """Soft prompts (m, v, d), each a way back that was found; `budget` is what it cost."""

    vectors: Tensor
    budget: dict[str, int]
    losses: Sequence[float]


@dataclass(frozen=True)
class AttackContext:
    """Arguments of one attack beside its target."""

    seed: int
    on_step: Callable[[Progress], None] = lambda progress: None
    """Called after every step."""
    state: Saved | None = None
    """Checkpoint of a run with the same arguments, to resume from."""


class Attack(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    access: ClassVar[Access]

    @abstractmethod
    def work(self) -> Work:
        """What an attack on one concept asks of the networks."""

    @abstractmethod
    def attack(self, target: AttackTarget, context: AttackContext) -> AttackResult:
        """Soft prompts for the erased model. Whether they succeed is judged on sampled pictures, not here."""

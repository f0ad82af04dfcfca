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
class Target:
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
class Found:
    """Soft prompts (m, v, d), each a way back that was found; `budget` is what it cost."""

    vectors: Tensor
    budget: dict[str, int]
    losses: Sequence[float]


class Attack(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    access: ClassVar[Access]

    @abstractmethod
    def work(self) -> Work:
        """What an attack on one concept asks of the networks."""

    @abstractmethod
    def attack(
        self,
        target: Target,
        *,
        seed: int,
        on_step: Callable[[Progress], None] = lambda p: None,
        state: Saved | None = None,
    ) -> Found:
        """Soft prompts for the erased model. Whether they succeed is judged on sampled pictures, not here.

        state: what a run of the same arguments saved, to go on with.
        """

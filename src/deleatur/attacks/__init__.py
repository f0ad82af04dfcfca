"""Plug-in kind: attacks that try to make the erased model generate the concept again."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.diffusion.predict import Weights
from deleatur.training.cost import Workload
from deleatur.training.optimizer_state import SavedState
from deleatur.training.textual_inversion import InversionProgress, PromptTemplates

Access = Literal["prompts", "text_encoder", "white_box", "original_model"]


@dataclass(frozen=True)
class AttackTarget:
    """The attacked model, with the erased weights laid over it, and the attacker's examples of the concept."""

    model: Model
    weights: Weights
    concept: str
    latents: Tensor
    """(n, C, H, W) latents of images that show the concept."""
    initializer: Tensor
    """(d,) initial embedding row of the soft prompts."""
    templates: Sequence[PromptTemplates]
    """(n) prompt templates for each image, each with a slot for the soft prompt."""


@dataclass(frozen=True)
class AttackResult:
    """Soft prompts (m, v, d), one per attempt, and `budget`, the number of network calls."""

    vectors: Tensor
    budget: dict[str, int]
    losses: Sequence[float]


@dataclass(frozen=True)
class AttackContext:
    """Arguments of one attack beside its target."""

    seed: int
    on_step: Callable[[InversionProgress], None] = lambda progress: None
    """Called after every step."""
    state: SavedState | None = None
    """Checkpoint of a run with the same arguments, to resume from."""


class Attack(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    access: ClassVar[Access]

    @abstractmethod
    def workload(self) -> Workload:
        """Network calls for an attack on one concept."""

    @abstractmethod
    def attack(self, target: AttackTarget, context: AttackContext) -> AttackResult:
        """Learns soft prompts against the erased model. Success is measured later, on sampled images."""

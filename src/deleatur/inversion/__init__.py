"""Plug-in kind: rated images → soft token."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.training.cost import Workload
from deleatur.training.optimizer_state import SavedState
from deleatur.training.textual_inversion import InversionProgress, LearnedToken, PromptTemplates, TokenEvaluator


@dataclass(frozen=True)
class InversionData:
    """The rated images of one concept."""

    latents: Tensor
    """(n, C, H, W) clean latents."""
    rewards: Tensor
    """(n,) r_ψ of each image."""
    features: Tensor
    """(n, d) CLIP features."""
    rank: bool
    """Rewards are standardised ranking scores, not vote shares."""
    rejected: Tensor
    """(n,) bool: most raters of the image said no, whatever its r_ψ."""
    templates: Sequence[PromptTemplates]
    """(n) prompt templates for each image, each with a slot for the token."""


@dataclass(frozen=True)
class InversionContext:
    """Arguments of one inversion beside the model and its data."""

    seed: int
    evaluate: TokenEvaluator
    """Scores images sampled from the learned vectors at every evaluation interval."""
    on_step: Callable[[InversionProgress], None] = lambda progress: None
    """Called after every step."""
    state: SavedState | None = None
    """Checkpoint of a run with the same arguments, to resume from."""


class Inverter(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def notes(self) -> list[str]:
        """Deviations from the paper, for the report."""
        return []

    @abstractmethod
    def workload(self) -> Workload:
        """Network calls for learning the tokens of one concept, evaluations excluded."""

    @abstractmethod
    def invert(
        self,
        model: Model,
        data: InversionData,
        initializer: Tensor,
        context: InversionContext,
    ) -> list[LearnedToken]:
        """Learns the m tokens of a concept, (v, d) each, starting from the embedding row `initializer` (d,)."""


def initial_vectors(initializer: Tensor, num_vectors: int, generator: torch.Generator) -> Tensor:
    """(v, d): the initializer repeated; rows after the first get noise of 1 % of its norm, so that they can diverge."""
    rows = initializer.repeat(num_vectors, 1)
    jitter = torch.randn(num_vectors, len(initializer), generator=generator).to(initializer)
    jitter[0] = 0
    vectors: Tensor = rows + jitter * initializer.norm() * 0.01 / len(initializer) ** 0.5
    return vectors

"""Plug-in kind: how noise predictions are combined at each sampler step. Product = Delta + Guide."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.records.model import Concept


class Guide(BaseModel):
    """A guidance rule with named hyperparameters. It is stateless: state is an argument and a return value."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    scale: float = 7.5
    """s_g of classifier-free guidance, 1 … 20; 7.5 is Stable Diffusion's default."""

    @abstractmethod
    def conditions(self, model: Model, concepts: Sequence[Concept]) -> dict[str, Tensor]:
        """Name → prompt embeddings (s, L, d) predicted at each step beside the prompt's. Without concepts: those of
        plain classifier-free guidance.
        """

    @abstractmethod
    def predictions_per_step(self, num_concepts: int) -> int:
        """Predictions per sampler step for this number of concepts; more where a concept does not fit in one prompt."""

    def start_step(self, concept: str) -> int:
        """The first sampler step at which the guide steers away from the concept."""
        return 0

    @abstractmethod
    def combine(self, step: int, eps_p: Tensor, eps: Mapping[str, Tensor], state: Any) -> tuple[Tensor, Any]:
        """ε̃ (B, …) at sampler step 0 … N−1, and the new state; the state of the first step is None.

        ε is the network's output, as in the released pipelines: v for a v-prediction checkpoint.

        eps_p: prediction for the prompt. eps: for each name in `conditions`, the mean over its prompts. Rows are
        images and must be independent of each other.
        """

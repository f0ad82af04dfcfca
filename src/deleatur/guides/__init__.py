"""Shelf: how predictions are combined at each sampler step. Product = Delta + Guide."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.records.model import Concept


class Guide(BaseModel):
    """A combination rule with named numbers. Keeps no state of its own: state goes in and comes out."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    scale: float = 7.5
    """s_g of classifier-free guidance, 1 … 20; 7.5 is Stable Diffusion's habit."""

    @abstractmethod
    def conditions(self, model: Model, concepts: Sequence[Concept]) -> dict[str, Tensor]:
        """Name → sentences (s, L, d) that run beside the prompt. Without concepts: what plain guidance needs."""

    @abstractmethod
    def predictions(self, concepts: int) -> int:
        """How many the sampler makes at each step when so many concepts are steered away from; more where a concept's
        words or tokens do not fit into one sentence.
        """

    def starts(self, concept: str) -> int:
        """The first sampler step at which it steers away from the concept."""
        return 0

    @abstractmethod
    def combine(self, step: int, eps_p: Tensor, eps: Mapping[str, Tensor], state: Any) -> tuple[Tensor, Any]:
        """ε̃ (B, …) at sampler step 0 … N−1, and the new state; the first step's is None.

        eps_p: prediction for the prompt. eps: for each name of `conditions`, the mean over its sentences. Rows are
        pictures, and no row may look at another.
        """

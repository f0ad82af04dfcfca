"""Shelf: how predictions are combined at each sampler step. Product = Delta + Guide."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from deleatur.records import Concept


class Guide(BaseModel):
    """A combination rule with named numbers. Keeps no state of its own: state goes in and comes out."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @abstractmethod
    def conditions(self, empty: Tensor, concepts: Sequence[Concept]) -> Tensor:
        """(m, L, d): the sentences to run beside the prompt, in the order `combine` expects. `empty` is E("")."""

    def start(self, shape: tuple[int, ...]) -> Any:
        """The state before the first step, for predictions of this shape."""
        return None

    @abstractmethod
    def combine(self, step: int, eps_p: Tensor, others: Tensor, state: Any) -> tuple[Tensor, Any]:
        """ε̃ of ε_p (B, …) and the m other predictions (m, B, …) at sampler step 0 … N−1, and the new state."""

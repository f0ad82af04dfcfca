"""Shelf: what removes a concept from the weights. Gives back a Delta; the given model stays as it was."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from deleatur.diffusion.model import Model
from deleatur.records.model import Concept, ConceptSource, Delta
from deleatur.training.cost import Work
from deleatur.training.finetune import ErasureContext


class Eraser(BaseModel):
    """A method with its named numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    learns_from_pictures: ClassVar[bool] = False
    """Whether concepts need their rated pictures."""

    @property
    def one_step(self) -> int | None:
        """As `Delta.one_step`, of what comes back."""
        return None

    def notes(self) -> list[str]:
        """What a reader of a report must know: what is ours and not the paper's, where a method is a reconstruction."""
        return []

    def fits(self, concepts: Sequence[str]) -> None:
        """Raises SettingsError when the numbers lack what the method must know of one of the concepts."""

    @abstractmethod
    def work(self, source: ConceptSource) -> Work:
        """What erasing asks of the networks, of concepts in words or soft tokens, without the looks of a probe."""

    @abstractmethod
    def touches(self, model: Model) -> set[str]:
        """Names of the UNet tensors that the delta may hold."""

    @abstractmethod
    def erase(self, model: Model, concepts: Sequence[Concept], context: ErasureContext) -> Delta:
        """The difference that removes the concepts.

        Same model, hyperparameters, preserved prompts and seed: same delta.
        Raises ErasureRefused when the run did nothing or destroyed the model.
        """

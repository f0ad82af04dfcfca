"""Shelf: what removes a concept from the weights. Gives back a Delta; the given model stays as it was."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.records.model import Concept, Delta, Given
from deleatur.training.cost import Work
from deleatur.training.finetune import Probe, Progress
from deleatur.training.optimizer_state import Saved


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
    def work(self, source: Given) -> Work:
        """What erasing asks of the networks, of concepts in words or soft tokens, without the looks of a probe."""

    @abstractmethod
    def touches(self, model: Model) -> set[str]:
        """Names of the UNet tensors that the delta may hold."""

    @abstractmethod
    def erase(
        self,
        model: Model,
        concepts: Sequence[Concept],
        *,
        keep: Tensor | None,
        seed: int,
        on_step: Callable[[Progress], None] = lambda p: None,
        probe: Probe | None = None,
        state: Saved | None = None,
    ) -> Delta:
        """The difference that removes the concepts.

        keep (q, L, d): states of prompts to preserve, for methods that use them. probe looks at sampled pictures.
        state: what a run of the same arguments saved, to go on with. Same model, settings and seed: same delta.
        Raises ErasureRefused when the run did nothing or destroyed the model.
        """

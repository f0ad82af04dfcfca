"""Plug-in kind: methods that remove a concept from the weights. They return a Delta and leave the model unmodified."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from deleatur.diffusion.model import Model
from deleatur.maths.noise import NoiseSchedule
from deleatur.records.model import Concept, ConceptSource, Delta
from deleatur.training.cost import Workload
from deleatur.training.loop import ErasureContext


class Eraser(BaseModel):
    """An erasure method; its fields are its hyperparameters."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    learns_from_images: ClassVar[bool] = False
    """Whether concepts need their rated images."""

    @property
    def one_step(self) -> int | None:
        """`Delta.one_step` of the result."""
        return None

    def notes(self) -> list[str]:
        """Deviations from the paper, for the report."""
        return []

    def check_concepts(self, concepts: Sequence[str]) -> None:
        """Raises SettingsError if the hyperparameters lack what the method needs for one of the concepts."""

    @abstractmethod
    def workload(self, source: ConceptSource) -> Workload:
        """Network calls of an erasure, evaluations excluded."""

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """Raises SettingsError if a hyperparameter does not fit the model's timesteps."""

    @abstractmethod
    def touched_parameters(self, model: Model) -> set[str]:
        """Names of the UNet parameters that the delta may contain."""

    @abstractmethod
    def erase(self, model: Model, concepts: Sequence[Concept], context: ErasureContext) -> Delta:
        """The weight difference that removes the concepts.

        Equal model, hyperparameters, concepts, preserved prompts and seed give equal deltas, bit for bit.
        Raises ErasureRefused when the run did nothing or destroyed the model.
        """

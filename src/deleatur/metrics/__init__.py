"""Shelf: numbers per picture first, so that intervals and paired differences come from one place afterwards."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from deleatur.diffusion.features import Clip
from deleatur.records import Detector, Prompt

Array = NDArray[np.float64]
Counts = Mapping[str, tuple[str, tuple[str, ...]]]
"""Concept → the detector and the labels of it that count as the concept."""


@dataclass(frozen=True)
class Seen:
    """What one detector said of n pictures."""

    labels: tuple[str, ...]
    scores: NDArray[np.float32]
    weights: str

    def top(self) -> list[str]:
        """The label with the highest score, per picture."""
        return [self.labels[i] for i in self.scores.argmax(1)]


@dataclass(frozen=True)
class Gallery:
    """n pictures of one side, in the order of `prompts`, with what the frozen networks said of them."""

    prompts: Sequence[Prompt]
    pictures: Sequence[Image.Image]
    seen: Mapping[str, Seen]
    features: Tensor
    """(n, d) CLIP embeddings."""
    clip: Clip
    counts: Counts
    rewards: Mapping[str, Tensor]
    """Concept → (n,) held-out r_ψ: from raters whose answers the token never saw."""


class Metric(BaseModel):
    """A number per picture. nan where it does not apply."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    higher_is_better: ClassVar[bool]
    rate: ClassVar[bool] = False
    """Values are 0 or 1, and their mean is a share."""

    @abstractmethod
    def values(self, shots: Gallery, base: Gallery) -> Array:
        """(n,). `base` holds the untouched model's pictures of the same prompts from the same noise."""

    def needs(self, prompts: Sequence[Prompt], counts: Counts) -> set[tuple[str, str]]:
        """(detector, label) of all that has to be there for pictures of these prompts."""
        return set()

    def detector(self, shots: Gallery) -> Detector | None:
        """What made the numbers, where a detector did."""
        return None


class SetMetric(Metric):
    """A number of a whole set of pictures; per picture it gives nothing."""

    least: ClassVar[int] = 8
    """Fewer pictures give no number."""

    def values(self, shots: Gallery, base: Gallery) -> Array:
        return np.full(len(shots.prompts), np.nan)

    @abstractmethod
    def of_set(self, shots: Tensor, base: Tensor) -> float:
        """From the feature rows of both sides, (n, d) each."""


def labelled(prompt: Prompt) -> tuple[str, str]:
    """ "judge:cat" → ("judge", "cat"): who should find what in the picture."""
    detector, _, label = prompt.label.partition(":")
    return detector, label

"""Shelf: what is in a picture. Label scores first; which labels count, and from which score, is the caller's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class Detections:
    """scores (n, L) of n pictures in the order given; `weights` is the SHA-256 of the network that made them."""

    labels: tuple[str, ...]
    scores: NDArray[np.float32]
    weights: str


class Detector(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @abstractmethod
    def peek(self) -> tuple[str, ...] | None:
        """Its labels, told without loading it; None where only a hub could tell. Raises ModelError when its files are
        missing or damaged.
        """

    @abstractmethod
    def detect(self, pictures: Sequence[Image.Image], on_batch: Callable[[int], None] = lambda n: None) -> Detections:
        """Scores in [0, 1]. A picture's scores do not depend on the others."""

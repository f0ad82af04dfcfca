"""Shelf: what is in a picture. Label scores first; which labels count, and from which score, is the caller's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class Network:
    """A detector that is loaded: known by what it is before it has looked at anything."""

    labels: tuple[str, ...]
    weights: str
    """SHA-256 over the weights and all that prepares a picture for them."""
    detect: Callable[[Sequence[Image.Image]], Scores]
    """Scores in [0, 1] of n pictures in the order given, (n, L). A picture's scores do not depend on the others."""


class Detector(BaseModel):
    """Its dump holds the numbers that decide scores, and only those: where its files lie, how many pictures go into one
    network call and on which device are excluded, or changing them would have everything looked at again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @abstractmethod
    def peek(self) -> tuple[str, ...] | None:
        """Its labels, told without loading it; None where only a hub could tell. Raises ModelError when its files are
        missing or damaged.
        """

    @abstractmethod
    def load(self) -> Network:
        """Raises ModelError when there is no such network."""

"""Plug-in kind: label scores of images. The caller decides which labels and scores count as a detection."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict

from deleatur.maths.finite import require_finite

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class LoadedDetector:
    """A detector with its weights in memory, identified by their digest."""

    labels: tuple[str, ...]
    weights: str
    """SHA-256 over the weights and the preprocessing."""
    predict: Callable[[Sequence[Image.Image]], Scores]
    """Scores in [0, 1] of n images, in order, (n, L). An image's scores do not depend on the other images."""

    def detect(self, images: Sequence[Image.Image]) -> Scores:
        """The scores of n images, (n, L). Raises ModelError: NaN is below every cut-off and would pass as clean."""
        return require_finite(
            self.predict(images), f"scores of the detector with labels {', '.join(self.labels[:3])}, …"
        )


class Detector(BaseModel):
    """A detector's hyperparameters. Its dump is part of the cache key of its scores, so it contains only what changes
    scores: paths, batch size and device are excluded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @abstractmethod
    def read_labels(self) -> tuple[str, ...] | None:
        """The labels, without loading the weights; None where only the Hub has them. Raises ModelError when its files
        are missing or damaged.
        """

    @abstractmethod
    def load(self) -> LoadedDetector:
        """Loads the weights. Raises ModelError when they do not exist or cannot be loaded."""

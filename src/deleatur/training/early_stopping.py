"""Evaluations during a training: which are acceptable, and which is the best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deleatur.diffusion.predict import Weights


@dataclass(frozen=True)
class Evaluation:
    """Scores of sampled images, a row of evaluations.json."""

    concept: float
    """Share of the concept's images that still show it."""
    preserved: float
    """Prompt alignment of preserved prompts' images; any scale, higher is better."""
    contrast: float = 1.0
    """Coarse contrast of the preserved prompts' images; near 0 for blank images and for noise."""


Probe = Callable[[Weights], Evaluation]
"""Validation: weights → scores of images sampled with them. {} is the base model."""

MIN_CONTRAST = 0.25
"""Share of the base model's contrast below which images count as blank or as noise."""

Row = Mapping[str, float]
"""An evaluation with its step, as in evaluations.json."""


def thresholds(base: Row, max_preserved_drop: float) -> dict[str, float]:
    """Lowest acceptable scores: preserved prompts are still followed, and their images neither blank nor noise."""
    preserved = base["preserved"] - max_preserved_drop * abs(base["preserved"])  # the score may be negative
    return {"preserved": preserved, "contrast": MIN_CONTRAST * base["contrast"]}


def acceptable(evaluations: Sequence[Row], max_preserved_drop: float) -> list[Row]:
    """Evaluations above both thresholds, without the first, which is the base model's."""
    lowest = thresholds(evaluations[0], max_preserved_drop)
    return [e for e in evaluations[1:] if all(e[name] >= threshold for name, threshold in lowest.items())]


def best(evaluations: Sequence[Row]) -> Row:
    """The one with the lowest concept rate, and among equals the highest preserved score."""
    return min(evaluations, key=lambda e: (e["concept"], -e["preserved"]))

"""Evaluations during a training: which are acceptable, and which is the best."""

from __future__ import annotations

import math
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


def describe(evaluations: Sequence[Row]) -> str:
    """One line per evaluation, for a message."""
    return "".join(
        f"\n  step {e['step']:.0f}: concept {e['concept']:.3f}, preserved {e['preserved']:.3f}, "
        f"contrast {e['contrast']:.3f}"
        for e in evaluations
    )


def advice(evaluations: Sequence[Row], max_preserved_drop: float) -> str:
    """What would change the outcome of a run in which no evaluation was acceptable."""
    base, last = evaluations[0], evaluations[-1]
    drop = (base["preserved"] - last["preserved"]) / (abs(base["preserved"]) or 1.0)
    less = "raise training.preservation_weight, or evaluate more often (training.eval_every)"
    blank = not last["contrast"] >= thresholds(base, max_preserved_drop)["contrast"]  # true for NaN as well
    if blank or not drop < 1:
        return f"lower training.lr, {less}"
    accepted = math.ceil(1000 * drop) / 1000
    return f"{less}; training.max_preserved_drop: {accepted:.3f} accepts step {last['step']:.0f} as it is"


def acceptable(evaluations: Sequence[Row], max_preserved_drop: float) -> list[Row]:
    """Evaluations above both thresholds, without the first, which is the base model's."""
    lowest = thresholds(evaluations[0], max_preserved_drop)
    return [e for e in evaluations[1:] if all(e[name] >= threshold for name, threshold in lowest.items())]


def best(evaluations: Sequence[Row]) -> Row:
    """The one with the lowest concept rate, and among equals the highest preserved score."""
    return min(evaluations, key=lambda e: (e["concept"], -e["preserved"]))

"""Evaluations during a training: which are acceptable, and which is the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

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
    preserved_by_prompt: list[float] = field(default_factory=list)
    """The scores that `preserved` is the mean of, in the order of the prompts: they tell a drop from noise."""


Probe = Callable[[Weights], Evaluation]
"""Validation: weights → scores of images sampled with them. {} is the base model."""

MIN_CONTRAST = 0.25
"""Share of the base model's contrast below which images count as blank or as noise."""

NOISE_QUANTILE = 1.645
"""A drop counts as far as it exceeds its standard error times this: the one-sided 95 % bound of a normal mean."""

Row = Mapping[str, Any]
"""An evaluation with its step, as in evaluations.json."""


def preserved_drop(base: Row, row: Row) -> tuple[float, float]:
    """Drop of the preserved score, and its standard error over the prompts, in units of the score.

    The difference is paired: both evaluations have the same prompts and noise. The error is 0 where there are no scores
    by prompt.
    """
    before, after = base.get("preserved_by_prompt", ()), row.get("preserved_by_prompt", ())
    error = 0.0
    if len(before) == len(after) > 1:
        error = float(np.std(np.subtract(before, after), ddof=1)) / math.sqrt(len(after))
    return base["preserved"] - row["preserved"], error


def certain_drop(base: Row, row: Row) -> float:
    """Lower bound of the preserved score's drop, as a share of the base model's score."""
    drop, error = preserved_drop(base, row)
    return (drop - NOISE_QUANTILE * error) / (abs(base["preserved"]) or 1.0)  # the score may be negative


def is_blank(base: Row, row: Row) -> bool:
    """Whether the images are blank or noise; true for NaN as well."""
    return not row["contrast"] >= MIN_CONTRAST * base["contrast"]


def is_acceptable(base: Row, row: Row, max_preserved_drop: float) -> bool:
    """Whether preserved prompts are still followed, as far as noise lets one see; false for NaN."""
    return certain_drop(base, row) <= max_preserved_drop and not is_blank(base, row)


def acceptable(evaluations: Sequence[Row], max_preserved_drop: float) -> list[Row]:
    """The acceptable evaluations, without the first, which is the base model's."""
    base, *rows = evaluations
    return [row for row in rows if is_acceptable(base, row, max_preserved_drop)]


def describe(evaluations: Sequence[Row]) -> str:
    """One line per evaluation, for a message."""
    base, lines = evaluations[0], []
    for row in evaluations:
        drop, error = (100 * value / (abs(base["preserved"]) or 1.0) for value in preserved_drop(base, row))
        change = f" ({-drop:+.1f} ± {error:.1f} %)" if row is not base else ""
        lines.append(
            f"\n  step {row['step']:.0f}: concept {row['concept']:.3f}, preserved {row['preserved']:.3f}{change}, "
            f"contrast {row['contrast']:.3f}"
        )
    return "".join(lines)


def advice(evaluations: Sequence[Row]) -> str:
    """What would change the outcome of a run in which no evaluation was acceptable."""
    base, last = evaluations[0], evaluations[-1]
    less = "raise training.preservation_weight, or evaluate more often (training.eval_every)"
    if is_blank(base, last) or not certain_drop(base, last) < 1:
        return f"lower training.lr, {less}"
    accepted = math.ceil(1000 * certain_drop(base, last)) / 1000
    return f"{less}; training.max_preserved_drop: {accepted:.3f} accepts step {last['step']:.0f} as it is"


def best(evaluations: Sequence[Row]) -> Row:
    """The one with the lowest concept rate, and among equals the highest preserved score."""
    return min(evaluations, key=lambda e: (e["concept"], -e["preserved"]))

"""Training curves of the long stages, for the HTML report and for MLflow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deleatur.config.settings import Settings
from deleatur.records.model import ErasureRecord
from deleatur.report.plots import Curve, Series
from deleatur.storage import files

TRAINING_METRICS = {
    "loss": "loss",
    "keep_loss": "preservation loss",
    "drift": "drift of the empty prompt",
    "grad_norm": "gradient norm before clipping",
}
"""Column of `CurvePoint`, and series in MLflow → title of the plot."""
EVALUATION_METRICS = {
    "concept": "concept rate",
    "preserved": "CLIP score of preserved prompts",
}
"""Column of `EvaluationPoint` → name of the series."""


@dataclass(frozen=True)
class CurvePoint:
    """A step of curve.json; which values a step has depends on the method."""

    step: int
    loss: float | None = None
    keep_loss: float | None = None
    drift: float | None = None
    grad_norm: float | None = None


@dataclass(frozen=True)
class EvaluationPoint:
    """An evaluation of evaluations.json."""

    step: int
    concept: float
    preserved: float


@dataclass(frozen=True)
class LearnedTokenCurve:
    """What the curves need of one token's entry in metrics.json."""

    losses: list[float]
    """By step."""


def training_curves(settings: Settings) -> Iterator[Curve]:
    """Curves of the reward, of inversion, erasure and attacks, as far as these stages have run."""
    paths = settings.paths
    for concept, losses in files.read_json_as(paths.reward / "curves.json", dict[str, dict[str, list[float]]]).items():
        yield _loss_curve(f"reward/{concept}", f"Reward of {concept}: loss on held-out prompts", "epoch", losses)
    if settings.erase.source == "token":
        for concept, learned in files.read_json_as(
            paths.tokens / "metrics.json", dict[str, list[LearnedTokenCurve]]
        ).items():
            # The loss of a single token is dominated by its noise.
            mean = np.mean([token.losses for token in learned], axis=0).tolist()
            title = f"Inversion of {concept}: loss, mean of {len(learned)} tokens"
            yield _loss_curve(f"invert/{concept}", title, "step", {"loss": mean})
    yield from _erasure_curves(settings)
    for name, values in files.read_json_as(paths.attacks / "curves.json", dict[str, list[float]]).items():
        yield _loss_curve(f"attack/{name}", f"Attack {name}: loss", "step", {"loss": values})


def _erasure_curves(settings: Settings) -> Iterator[Curve]:
    delta = settings.paths.delta
    steps = files.read_json_as(delta / "curve.json", list[CurvePoint])
    evaluations = files.read_json_as(delta / "evaluations.json", list[EvaluationPoint])
    for key, name in TRAINING_METRICS.items():
        if points := [(s.step, value) for s in steps if (value := getattr(s, key)) is not None]:
            yield Curve("erase", f"Erasure: {name}", "step", [Series(key, points)])
    if evaluations:
        selected = files.read_json_as(delta / "record.json", ErasureRecord).selected
        marker = (selected, "selected") if selected is not None and selected < evaluations[-1].step else None
        series = [
            Series(name, [(e.step, getattr(e, key)) for e in evaluations]) for key, name in EVALUATION_METRICS.items()
        ]
        yield Curve("erase/evaluation", "Erasure: evaluations on sampled images", "step", series, marker)


def _loss_curve(key: str, title: str, x: str, losses: dict[str, list[float]]) -> Curve:
    return Curve(key, title, x, [Series(name, list(enumerate(values, 1))) for name, values in losses.items()])

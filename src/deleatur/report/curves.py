"""Training curves of the long stages, for the HTML report and for MLflow."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from deleatur.config.settings import Settings
from deleatur.report.plots import Curve, Series
from deleatur.storage import files

TRAINING_METRICS = {
    "loss": "loss",
    "keep_loss": "loss on prompts to preserve",
    "drift": "drift of the empty prompt",
    "grad_norm": "norm of the gradient, before it is capped",
}
"""Column of curve.json, and series in MLflow → title of the plot."""
EVALUATION_METRICS = {
    "concept": "concept rate",
    "preserved": "CLIP score of preserved prompts",
}
"""Column of evaluations.json → name of the series."""


def training_curves(settings: Settings) -> Iterator[Curve]:
    """Curves of the reward, of inversion, erasure and attacks, as far as these stages have run."""
    paths = settings.paths
    for concept, losses in files.read_object(paths.reward / "curves.json").items():
        yield _loss_curve(f"reward/{concept}", f"Reward of {concept}: loss on held-out prompts", "epoch", losses)
    if settings.erase.source == "token":
        for concept, learned in files.read_object(paths.tokens / "metrics.json").items():
            # The loss of a single token is dominated by its noise.
            mean = np.mean([token["losses"] for token in learned], axis=0).tolist()
            title = f"Inversion of {concept}: loss, mean of {len(learned)} tokens"
            yield _loss_curve(f"invert/{concept}", title, "step", {"loss": mean})
    yield from _erasure_curves(settings)
    for name, losses in files.read_object(paths.attacks / "curves.json").items():
        yield _loss_curve(f"attack/{name}", f"Attack {name}: loss", "step", {"loss": losses})


def _erasure_curves(settings: Settings) -> Iterator[Curve]:
    delta = settings.paths.delta
    steps, evaluations = (files.read_json(delta / f"{name}.json") for name in ("curve", "evaluations"))
    for key, name in TRAINING_METRICS.items():
        if points := [(step["step"], step[key]) for step in steps if key in step]:
            yield Curve("erase", f"Erasure: {name}", "step", [Series(key, points)])
    if evaluations:
        selected = files.read_object(delta / "record.json", "selected")["selected"]
        marker = (selected, "selected") if selected < evaluations[-1]["step"] else None
        series = [Series(name, [(e["step"], e[key]) for e in evaluations]) for key, name in EVALUATION_METRICS.items()]
        yield Curve("erase/evaluation", "Erasure: evaluations on sampled images", "step", series, marker)


def _loss_curve(key: str, title: str, x: str, losses: dict[str, list[float]]) -> Curve:
    return Curve(key, title, x, [Series(name, list(enumerate(values, 1))) for name, values in losses.items()])

"""What happened over the steps of the long stages: the same curves for the page and for MLflow."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from deleatur.config.settings import Settings
from deleatur.report.page import Curve, Series
from deleatur.storage import files

ERASING = {
    "loss": "loss",
    "keep_loss": "loss on prompts to preserve",
    "drift": "drift of the empty prompt",
    "grad_norm": "norm of the gradient, before it is capped",
}
LOOKS = {
    "concept": "concept rate",
    "kept": "CLIP score of preserved prompts",
}


def curves(settings: Settings) -> Iterator[Curve]:
    paths = settings.paths
    for concept, of in files.read_json(paths.reward / "curves.json").items():
        yield _losses(f"reward/{concept}", f"Reward of {concept}: loss on prompts not learned from", "epoch", of)
    if settings.erase.source == "token":
        for concept, learned in files.read_json(paths.tokens / "metrics.json").items():
            mean = np.mean([token["losses"] for token in learned], axis=0).tolist()  # of a token alone it is noise
            yield _losses(
                f"invert/{concept}", f"Inverting {concept}: loss, mean of {len(learned)}", "step", {"loss": mean}
            )
    rows, looks = (files.read_json(paths.delta / f"{name}.json") for name in ("curve", "looks"))
    for name, title in ERASING.items():
        if points := [(row["step"], row[name]) for row in rows if name in row]:
            yield Curve("erase", f"Erasing: {title}", "step", [Series(name, points)])
    if looks:
        kept = files.read_json(paths.delta / "record.json")["kept"]
        mark = (kept, "kept") if kept < looks[-1]["step"] else None
        series = [Series(name, [(look["step"], look[key]) for look in looks]) for key, name in LOOKS.items()]
        yield Curve("erase/look", "Looks at sampled pictures", "step", series, mark)
    for name, losses in files.read_json(paths.attacks / "curves.json").items():
        yield _losses(f"attack/{name}", f"Attacking: {name}, loss", "step", {"loss": losses})


def _losses(key: str, title: str, x: str, of: dict[str, list[float]]) -> Curve:
    return Curve(key, title, x, [Series(name, list(enumerate(losses, 1))) for name, losses in of.items()])

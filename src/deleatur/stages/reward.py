"""feedback → reward/<concept>.safetensors: what raters would say of a picture, and how far that holds elsewhere."""

from __future__ import annotations

from math import isnan
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from deleatur.artifacts import rated_images
from deleatur.config.settings import Settings
from deleatur.errors import DataError, at
from deleatur.feedback import reward, votes
from deleatur.feedback.reward import Numbers, Pairs, Votes
from deleatur.maths.seeds import derive
from deleatur.records.feedback import Kind
from deleatur.runtime import models
from deleatur.runtime.progress import bar
from deleatur.storage import files, tensors


def run(settings: Settings) -> None:
    clip = models.clip_model(settings)
    numbers = Numbers(**settings.reward.model_dump(exclude={"clip", "held_out_raters"}))
    files.emptied(settings.paths.reward)
    metrics: dict[str, Any] = {}
    curves: dict[str, dict[str, list[float]]] = {}
    with bar("reward", 2 * len(settings.targets)) as advance:
        for name in settings.targets:
            spec, pool = settings.concepts[name], rated_images.RatedImages(settings, name)
            with at(name):
                held_out = _held_out(settings, pool.answers)
            features = clip.pictures(pool.pictures)
            heads, found = {}, {}
            for which, mine in (("train", ~held_out), ("held_out", held_out)):
                target = _target(pool, pool.answers[mine], spec.kind)
                seed = derive(settings.seed, "reward", name, which)
                with at(f"{name}, {'held-out' if which == 'held_out' else 'other'} raters"):
                    fit = reward.fit(features, target, pool.groups(), numbers, seed)
                heads[which] = fit
                found[which] = {
                    "quality": _known(fit.held_out),
                    "epochs": fit.epochs,
                    "raters": int(pool.answers[mine]["rater"].nunique()),
                }
                advance(note=f"{name} {which}: {_measure(spec.kind)} {fit.held_out:.3f}")
            others = _target(pool, pool.answers[held_out], spec.kind)
            word = clip.texts([" ".join(spec.words)])
            metrics[name] = {
                "measure": _measure(spec.kind),
                "pictures": len(pool.pictures),
                "new_prompts": found,
                "new_raters": _known(reward.quality(heads["train"].head(features), others)),
                "zero_shot": _known(reward.quality((features @ word.T).squeeze(1), others)),
            }
            curves[name] = {
                {"train": "training raters", "held_out": "held-out raters"}[w]: f.curve for w, f in heads.items()
            }
            flat = {f"{w}/{n}": t for w, f in heads.items() for n, t in f.head.tensors.items()}
            facts = {"rank": spec.kind == "rank", "clip": clip.digest, "concept": name}
            tensors.save(settings.paths.reward / f"{name}.safetensors", flat, facts)
    files.write_json(settings.paths.reward / "metrics.json", metrics)
    files.write_json(settings.paths.reward / "curves.json", curves)


def _measure(kind: Kind) -> str:
    return "AUC" if kind == "binary" else "pair accuracy"


def _known(quality: float) -> float | None:
    """JSON has no nan: what cannot be told is null."""
    return None if isnan(quality) else quality


def _held_out(settings: Settings, answers: pd.DataFrame) -> pd.Series[bool]:
    """Which answers are of held-out raters: a fixed share of raters, drawn by their hash and the seed."""
    names = sorted(set(answers["rater"]), key=lambda r: derive(settings.seed, "held-out raters", r))
    if len(names) < 2:
        raise DataError(
            f"expected answers of two raters or more, got those of {len(names)}: who taught the token cannot judge it",
            hint=reward.COLLECT,
        )
    count = min(max(1, round(settings.reward.held_out_raters * len(names))), len(names) - 1)
    return answers["rater"].isin(names[:count])


def _target(pool: rated_images.RatedImages, answers: pd.DataFrame, kind: Kind) -> Votes | Pairs:
    """What these answers say. Raters are weighed from these answers alone, or the other half would leak in."""
    raters = votes.raters(answers)
    if kind == "rank":
        found = votes.pairs(answers, raters)
        better, worse = (torch.tensor([pool.row[d] for d in found[c]], dtype=torch.long) for c in ("higher", "lower"))
        return Pairs(better, worse, _floats(found["weight"]))
    y, weight = torch.zeros(len(pool.pictures)), torch.zeros(len(pool.pictures))
    found = votes.votes(answers, raters).dropna(subset=["vote"])
    rows = [pool.row[d] for d in found["item"]]
    y[rows], weight[rows] = _floats(found["vote"]), _floats(found["weight"])
    return Votes(y, weight)


def _floats(column: pd.Series[Any]) -> Tensor:
    return torch.tensor(column.to_numpy("float32"))

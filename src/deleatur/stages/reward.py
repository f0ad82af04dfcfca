"""feedback → reward/<concept>.safetensors: models that predict raters' answers, with their cross-validated quality."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from deleatur.artifacts import rated_images
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.diffusion.clip import Clip
from deleatur.errors import DataError, error_context
from deleatur.feedback import reward, votes
from deleatur.feedback.reward import PairTargets, RewardHyperparameters, VoteTargets
from deleatur.maths.seeds import derive
from deleatur.records.feedback import FeedbackKind
from deleatur.runtime import models
from deleatur.runtime.progress import Bar, bar
from deleatur.storage import files, tensors


@dataclass(frozen=True)
class _Trained:
    """Reward heads of one concept."""

    metrics: dict[str, Any]
    curves: dict[str, list[float]]
    weights: dict[str, Tensor]
    metadata: dict[str, Any]


def run(settings: Settings) -> None:
    clip = models.clip_model(settings)
    trained: dict[str, _Trained] = {}
    skipped: dict[str, str] = {}
    with bar("reward", 2 * len(settings.targets)) as advance:
        for name in settings.targets:
            try:
                trained[name] = _train(settings, clip, name, advance)
            except DataError as e:
                if methods.requires_ratings(settings):
                    raise
                # A concept that is erased by its words needs no ratings: see `evaluation.probe`.
                skipped[name] = f"skipped: {e}"
                advance.set(2 * (len(trained) + len(skipped)), 2 * len(settings.targets), f"{name} {skipped[name]}")
    with files.replace_folder(settings.paths.reward) as folder:
        for name, heads in trained.items():
            tensors.save(folder / f"{name}.safetensors", heads.weights, heads.metadata)
        files.write_json(folder / "metrics.json", {name: heads.metrics for name, heads in trained.items()} | skipped)
        files.write_json(folder / "curves.json", {name: heads.curves for name, heads in trained.items()})


def _train(settings: Settings, clip: Clip, name: str, advance: Bar) -> _Trained:
    """Two heads, of separate raters. Raises DataError when the answers are too few or all alike."""
    hyperparameters = RewardHyperparameters(**settings.reward.model_dump(exclude={"clip", "held_out_raters"}))
    spec, pool = settings.concepts[name], rated_images.RatedPool(settings, name)
    with error_context(name):
        held_out = _held_out(settings, pool.answers)
    features = clip.embed_images(pool.images)
    fits, by_split = {}, {}
    for split, selected in (("train", ~held_out), ("held_out", held_out)):
        target = _target(pool, pool.answers[selected], spec.kind)
        seed = derive(settings.seed, "reward", name, split)
        with error_context(f"{name}, {'held-out' if split == 'held_out' else 'other'} raters"):
            fit = reward.fit(features, target, pool.groups(), hyperparameters, seed)
        fits[split] = fit
        by_split[split] = {
            "quality": _none_if_nan(fit.held_out_quality),
            "epochs": fit.epochs,
            "raters": int(pool.answers[selected]["rater"].nunique()),
        }
        advance(note=f"{name} {split}: {_metric_name(spec.kind)} {fit.held_out_quality:.3f}")
    held_out_target = _target(pool, pool.answers[held_out], spec.kind)
    words = clip.embed_texts(spec.words)
    metrics = {
        "metric": _metric_name(spec.kind),
        "images": len(pool.images),
        "new_prompts": by_split,
        "new_raters": _none_if_nan(reward.quality(fits["train"].head(features), held_out_target)),
        "zero_shot": _none_if_nan(reward.quality((features @ words.T).mean(1), held_out_target)),
    }
    titles = {"train": "training raters", "held_out": "held-out raters"}
    curves = {titles[split]: fit.validation_losses for split, fit in fits.items()}
    weights = {f"{split}/{n}": t for split, fit in fits.items() for n, t in fit.head.tensors.items()}
    return _Trained(metrics, curves, weights, {"rank": spec.kind == "rank", "clip": clip.digest, "concept": name})


def _metric_name(kind: FeedbackKind) -> str:
    return "AUC" if kind == "binary" else "pair accuracy"


def _none_if_nan(quality: float) -> float | None:
    """NaN as None: JSON has no NaN."""
    return None if isnan(quality) else quality


def _held_out(settings: Settings, answers: pd.DataFrame) -> pd.Series[bool]:
    """Mask of the answers of held-out raters: a fixed share of the raters, chosen by hash and seed."""
    names = sorted(set(answers["rater"]), key=lambda r: derive(settings.seed, "held-out raters", r))
    if len(names) < 2:
        raise DataError(
            f"expected answers of two raters or more, got those of {len(names)}: evaluation needs raters who did not "
            "train the token",
            hint=reward.COLLECT_MORE,
        )
    count = min(max(1, round(settings.reward.held_out_raters * len(names))), len(names) - 1)
    return answers["rater"].isin(names[:count])


def _target(pool: rated_images.RatedPool, answers: pd.DataFrame, kind: FeedbackKind) -> VoteTargets | PairTargets:
    """Training targets from these answers. Rater weights use them alone, or the other split would leak in."""
    raters = votes.rater_table(answers)
    if kind == "rank":
        pairs = votes.pair_table(answers, raters)
        better, worse = (
            torch.tensor([pool.row_of[d] for d in pairs[c]], dtype=torch.long) for c in ("higher", "lower")
        )
        return PairTargets(better, worse, _float_tensor(pairs["weight"]))
    y, weight = torch.zeros(len(pool.images)), torch.zeros(len(pool.images))
    voted = votes.vote_table(answers, raters).dropna(subset=["vote"])
    rows = [pool.row_of[d] for d in voted["item"]]
    y[rows], weight[rows] = _float_tensor(voted["vote"]), _float_tensor(voted["weight"])
    return VoteTargets(y, weight)


def _float_tensor(column: pd.Series[Any]) -> Tensor:
    return torch.tensor(column.to_numpy("float32"))

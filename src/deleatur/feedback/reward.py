"""The reward model r_ψ of HFI: how strongly an image shows the concept, from frozen CLIP features.

x: features (n, d)       y: share of raters who said yes (n,)       (x⁺, x⁻): ranked pairs, x⁺ shows the concept more
binary:   L(ψ) = mean (r_ψ(x) − y)², the Brier score, whose minimiser is the vote share, so disagreement is preserved
ranking:  L(ψ) = −Σ w log σ(r_ψ(x⁺) − r_ψ(x⁻)), Bradley–Terry: defined up to a constant, so scores are standardised
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from deleatur.errors import DataError
from deleatur.maths.finite import require_finite

COLLECT_MORE = "collect more answers, append them to a source (docs/feedback.md), then: deleatur stage ingest"


class RewardHyperparameters(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    hidden: int = Field(256, gt=0)
    """Width of the hidden layer."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout probability of the hidden layer."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate of AdamW."""
    weight_decay: float = Field(1e-2, ge=0)
    """Weight decay of AdamW."""
    epochs: int = Field(200, gt=0)
    """Maximum number of full-batch steps; cross-validation selects how many are used."""
    folds: int = Field(5, gt=1)
    """Cross-validation folds; the images of one prompt stay in one fold."""


@dataclass(frozen=True)
class VoteTargets:
    """Vote shares y (n,) and the weight of each image (n,), its effective number of votes."""

    y: Tensor
    weight: Tensor


@dataclass(frozen=True)
class PairTargets:
    """Row indices (better, worse) into the feature table, (p,) each, and the weight of each pair (p,)."""

    better: Tensor
    worse: Tensor
    weight: Tensor


@dataclass(frozen=True)
class RewardHead:
    """r_ψ as named tensors. `rank` heads are standardised over the images they were fitted on."""

    tensors: dict[str, Tensor]
    rank: bool

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """(n, d) → scores (n,)."""
        scores = (_forward(self.tensors, x) - self.tensors["mean"]) / self.tensors["std"]
        return require_finite(scores, "scores of a reward head")


@dataclass(frozen=True)
class RewardFit:
    head: RewardHead
    epochs: int
    held_out_quality: float
    """AUC of majority votes (binary) or pair accuracy (ranking) on held-out prompts, mean of the folds; nan where no
    fold has answers of both classes."""
    validation_losses: list[float]
    """Validation loss per epoch, mean of the folds."""


def fit(
    x: Tensor,
    target: VoteTargets | PairTargets,
    groups: NDArray[np.int64],
    hyperparameters: RewardHyperparameters,
    seed: int,
) -> RewardFit:
    """Selects the number of epochs by grouped cross-validation, then fits on all images.

    x: (n, d) features. groups: (n,) prompt index of each image; images of one prompt stay in one fold.
    The number of epochs is the one with the lowest mean validation loss.
    Raises DataError when all answers are equal, or when they are about a single prompt.
    """
    _require_contrast(target)
    from sklearn.model_selection import GroupKFold  # slow import; most stages only apply a fitted head

    folds = min(hyperparameters.folds, len(np.unique(groups)))
    fold_losses, fold_scores = [], []
    splits = GroupKFold(folds).split(groups, groups=groups) if folds > 1 else ()
    for number, (train, test) in enumerate(splits):
        training, validation = _restrict_to(target, train), _restrict_to(target, test)
        if not _total_weight(training) or not _total_weight(validation):
            continue
        losses: list[float] = []
        scores: list[Tensor] = []

        def validate(
            head: RewardHead,
            validation: VoteTargets | PairTargets = validation,
            losses: list[float] = losses,
            scores: list[Tensor] = scores,
        ) -> None:
            scores.append(head(x))
            losses.append(float(_loss(scores[-1], validation)))

        _train(x, training, hyperparameters, seed + number, hyperparameters.epochs, validate)
        fold_losses.append(losses)
        fold_scores.append((scores, validation))
    if not fold_losses:
        raise DataError(
            "expected answers about images of two prompts or more, got one prompt: the reward is fitted on some "
            "prompts and validated on others",
            hint=COLLECT_MORE,
        )
    mean_losses = np.mean(fold_losses, axis=0)
    best = int(mean_losses.argmin())
    head = _train(x, target, hyperparameters, seed, best + 1, None)
    qualities = [q for scores, validation in fold_scores if not np.isnan(q := quality(scores[best], validation))]
    return RewardFit(head, best + 1, float(np.mean(qualities)) if qualities else float("nan"), mean_losses.tolist())


def _require_contrast(target: VoteTargets | PairTargets) -> None:
    if not _total_weight(target):
        raise DataError("expected yes/no answers or rankings, got only unsure and skip", hint=COLLECT_MORE)
    if isinstance(target, VoteTargets):
        votes = target.y[target.weight > 0]
        if float(votes.min()) == float(votes.max()):
            raise DataError(
                f"expected images with different shares of yes, got {float(votes[0]):.0%} for all {len(votes)}",
                hint=COLLECT_MORE,
            )


def quality(scores: Tensor, target: VoteTargets | PairTargets) -> float:
    """AUC against the majority vote, or the share of correctly ordered pairs; nan when there is only one class."""
    if isinstance(target, PairTargets):
        return float((scores[target.better] > scores[target.worse]).float().mean())  # nan without a pair
    from sklearn.metrics import roc_auc_score

    has_votes = target.weight > 0
    labels = (target.y[has_votes] >= 0.5).numpy()
    return float(roc_auc_score(labels, scores[has_votes].numpy())) if 0 < labels.sum() < len(labels) else float("nan")


def _train(
    x: Tensor,
    target: VoteTargets | PairTargets,
    hyperparameters: RewardHyperparameters,
    seed: int,
    epochs: int,
    on_epoch: Callable[[RewardHead], None] | None,
) -> RewardHead:
    g = torch.Generator().manual_seed(seed % 2**63)
    t = _init_parameters(x.shape[1], hyperparameters.hidden, g)
    optimizer = torch.optim.AdamW(t.values(), lr=hyperparameters.lr, weight_decay=hyperparameters.weight_decay)
    keep_probability = 1 - hyperparameters.dropout
    for _ in range(epochs):
        mask = torch.empty(len(x), hyperparameters.hidden).bernoulli_(keep_probability, generator=g) / keep_probability
        loss = _loss(_forward(t, x, mask), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if on_epoch:
            on_epoch(_to_head(t, x, isinstance(target, PairTargets)))
    return _to_head(t, x, isinstance(target, PairTargets))


def _init_parameters(d: int, hidden: int, g: torch.Generator) -> dict[str, Tensor]:
    """The initialization of `nn.Linear`, which itself only samples from the global generator."""

    def uniform(*shape: int, fan_in: int) -> Tensor:
        bound = fan_in**-0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=g).requires_grad_()

    return {
        "in.weight": uniform(hidden, d, fan_in=d),
        "in.bias": uniform(hidden, fan_in=d),
        "out.weight": uniform(1, hidden, fan_in=hidden),
        "out.bias": uniform(1, fan_in=hidden),
    }


def _forward(t: dict[str, Tensor], x: Tensor, mask: Tensor | None = None) -> Tensor:
    """(n, d) → (n,). mask (n, hidden): the dropout mask, in training."""
    hidden = F.gelu(F.linear(x, t["in.weight"], t["in.bias"]))
    return F.linear(hidden if mask is None else hidden * mask, t["out.weight"], t["out.bias"]).squeeze(-1)


def _to_head(t: dict[str, Tensor], x: Tensor, rank: bool) -> RewardHead:
    tensors = {n: w.detach().clone() for n, w in t.items()}
    unscaled = RewardHead(tensors | {"mean": torch.tensor(0.0), "std": torch.tensor(1.0)}, rank)
    if not rank:
        return unscaled
    r = unscaled(x)
    return RewardHead(tensors | {"mean": r.mean(), "std": r.std().clamp(min=1e-6)}, rank)


def _loss(r: Tensor, target: VoteTargets | PairTargets) -> Tensor:
    if isinstance(target, PairTargets):
        log_p = F.logsigmoid(r[target.better] - r[target.worse])
        return -(target.weight * log_p).sum() / target.weight.sum().clamp(min=1e-6)
    return (target.weight * (r - target.y).square()).sum() / target.weight.sum().clamp(min=1e-6)


def _restrict_to(target: VoteTargets | PairTargets, rows: NDArray[np.int64]) -> VoteTargets | PairTargets:
    """The targets of these rows: other votes get weight 0, and pairs need both images among the rows."""
    if isinstance(target, PairTargets):
        inside = torch.zeros(int(max(target.better.max(), target.worse.max(), rows.max())) + 1, dtype=torch.bool)
        inside[torch.from_numpy(rows)] = True
        both = inside[target.better] & inside[target.worse]
        return PairTargets(target.better[both], target.worse[both], target.weight[both])
    mask = torch.zeros_like(target.weight)
    mask[torch.from_numpy(rows)] = 1
    return VoteTargets(target.y, target.weight * mask)


def _total_weight(target: VoteTargets | PairTargets) -> float:
    return float(target.weight.sum())

"""The reward model r_ψ of HFI: how strongly an image shows the concept, from frozen CLIP features.

x: features (n, d)       y: share of raters who said yes (n,)       (x⁺, x⁻): ranked pairs, x⁺ shows the concept more
binary:   L(ψ) = mean (r_ψ(x) − y)², the Brier score, whose minimiser is the vote share, so disagreement is preserved
ranking:  L(ψ) = −Σ w log σ(r_ψ(x⁺) − r_ψ(x⁻)), Bradley–Terry: defined up to a constant, so scores are standardised

Cross-validation selects the epoch with the lowest loss on held-out prompts, of the scores before standardisation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from deleatur.errors import DataError
from deleatur.maths.finite import require_finite

COLLECT_MORE = "collect more answers, append them to a source (docs/feedback.md), then: deleatur stage ingest"


class RewardHyperparameters(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

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
    """The weights of `_network`, and the `mean` and `std` of its scores."""
    rank: bool

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """(n, d) → scores (n,)."""
        weights = {name: tensor for name, tensor in self.tensors.items() if name not in ("mean", "std")}
        hidden, d = weights["in.weight"].shape
        with torch.device("meta"):  # neither memory nor random numbers
            network = _network(d, hidden, dropout=0.0)
        scores: Tensor = functional_call(network.eval(), weights, (x,)).squeeze(-1)
        scores = (scores - self.tensors["mean"]) / self.tensors["std"]
        return require_finite(scores, "scores of a reward head")


@dataclass(frozen=True)
class RewardFit:
    """A fitted reward head and its cross-validation."""

    head: RewardHead
    epochs: int
    held_out_quality: float
    """AUC of majority votes (binary) or pair accuracy (ranking) on held-out prompts, mean of the folds; nan where no
    fold has answers of both classes. Each fold is scored at the epoch that the other folds select: the epoch that is
    best on its own prompts would be optimistic."""
    validation_losses: list[float]
    """Validation loss per epoch, mean of the folds."""


@dataclass(frozen=True)
class _Fold:
    validation: VoteTargets | PairTargets
    losses: list[float]
    """By epoch, on the validation targets."""
    scores: list[Tensor]
    """By epoch, (n,), of all images."""


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
    Raises DataError if all answers are equal, or when they are about a single prompt.
    """
    _require_contrast(target)
    folds = _cross_validate(x, target, groups, hyperparameters, seed)
    losses = np.array([fold.losses for fold in folds])  # (folds, epochs)
    mean_losses = losses.mean(0)
    best = int(mean_losses.argmin())
    others = losses.sum(0) - losses if len(folds) > 1 else losses  # of all folds but this one, (folds, epochs)
    qualities = [quality(f.scores[epoch], f.validation) for f, epoch in zip(folds, others.argmin(1), strict=True)]
    defined = [q for q in qualities if not np.isnan(q)]
    network = _train(x, target, hyperparameters, seed, best + 1)
    head = _to_head(network, x, isinstance(target, PairTargets))
    return RewardFit(head, best + 1, float(np.mean(defined)) if defined else float("nan"), mean_losses.tolist())


def _cross_validate(
    x: Tensor,
    target: VoteTargets | PairTargets,
    groups: NDArray[np.int64],
    hyperparameters: RewardHyperparameters,
    seed: int,
) -> list[_Fold]:
    """Trains on each fold's complement; folds without answers on either side are left out."""
    from sklearn.model_selection import GroupKFold  # slow import; most stages only apply a fitted head

    n_folds, folds = min(hyperparameters.folds, len(np.unique(groups))), list[_Fold]()
    splits = GroupKFold(n_folds).split(groups, groups=groups) if n_folds > 1 else ()
    for number, (train, test) in enumerate(splits):
        training, validation = _restrict_to(target, train), _restrict_to(target, test)
        if not _total_weight(training) or not _total_weight(validation):
            continue
        fold = _Fold(validation, [], [])

        def validate(scores: Tensor, fold: _Fold = fold) -> None:
            fold.scores.append(scores)
            fold.losses.append(float(_loss(scores, fold.validation)))

        _train(x, training, hyperparameters, seed + number, hyperparameters.epochs, validate)
        folds.append(fold)
    if not folds:
        raise DataError(
            "expected answers about images of two prompts or more, got one prompt: the reward is fitted on some "
            "prompts and validated on others",
            hint=COLLECT_MORE,
        )
    return folds


def _require_contrast(target: VoteTargets | PairTargets) -> None:
    """Raises DataError if there are no targets, or all vote shares are equal."""
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


def _network(d: int, hidden: int, dropout: float) -> nn.Sequential:
    """(n, d) → (n, 1)."""
    layers = {
        "in": nn.Linear(d, hidden),
        "gelu": nn.GELU(),
        "dropout": nn.Dropout(dropout),
        "out": nn.Linear(hidden, 1),
    }
    return nn.Sequential(OrderedDict(layers))


def _train(
    x: Tensor,
    target: VoteTargets | PairTargets,
    hyperparameters: RewardHyperparameters,
    seed: int,
    epochs: int,
    on_epoch: Callable[[Tensor], None] | None = None,
) -> nn.Sequential:
    """on_epoch: called with the scores (n,) of all images after every step."""
    with torch.random.fork_rng(devices=[]):  # layers sample from the global generator only
        torch.manual_seed(seed % 2**63)
        network = _network(x.shape[1], hyperparameters.hidden, hyperparameters.dropout)
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=hyperparameters.lr, weight_decay=hyperparameters.weight_decay
        )
        for _ in range(epochs):
            loss = _loss(network.train()(x).squeeze(-1), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if on_epoch:
                on_epoch(_scores(network, x))
    return network


@torch.no_grad()
def _scores(network: nn.Sequential, x: Tensor) -> Tensor:
    scores: Tensor = network.eval()(x).squeeze(-1)
    return scores


def _to_head(network: nn.Sequential, x: Tensor, rank: bool) -> RewardHead:
    weights = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    scores = _scores(network, x)
    mean, std = (scores.mean(), scores.std().clamp(min=1e-6)) if rank else (torch.tensor(0.0), torch.tensor(1.0))
    return RewardHead(weights | {"mean": mean, "std": std}, rank)


def _loss(r: Tensor, target: VoteTargets | PairTargets) -> Tensor:
    """Weighted mean loss L(ψ) of the scores r (n,)."""
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

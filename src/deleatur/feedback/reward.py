"""The reward r_ψ: how much a picture shows the concept, from frozen CLIP features (HFI).

x: features (n, d)       y: share of raters who said yes (n,)       (x⁺, x⁻): ranked pairs, x⁺ shows it more
binary:   L(ψ) = mean (r_ψ(x) − y)², the Brier score: its minimiser is the vote share, so disagreement is kept
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

COLLECT = "collect more answers and append them to a source (docs/feedback.md), then: deleatur stage ingest"


class Numbers(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    hidden: int = Field(256, gt=0)
    """Width of the hidden layer."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of the hidden layer left out in each step of training."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate of AdamW."""
    weight_decay: float = Field(1e-2, ge=0)
    """Of AdamW."""
    epochs: int = Field(200, gt=0)
    """Most full-batch steps; cross-validation picks how many are used."""
    folds: int = Field(5, gt=1)
    """Of the cross-validation; the pictures of one prompt stay in one fold."""


@dataclass(frozen=True)
class Votes:
    """y (n,) and the weight of each picture (n,), its number of effective votes."""

    y: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Pairs:
    """Rows (better, worse) of the feature table, (p,) each, and what each pair weighs (p,)."""

    better: Tensor
    worse: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Head:
    """r_ψ as named tensors. `rank` heads are standardised over the pool they were fitted on."""

    tensors: dict[str, Tensor]
    rank: bool

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """(n, d) → scores (n,)."""
        return (_score(self.tensors, x) - self.tensors["mean"]) / self.tensors["std"]


@dataclass(frozen=True)
class Fit:
    head: Head
    epochs: int
    held_out: float
    """AUC of majority votes (binary) or pair accuracy (ranking) on prompts the head has not seen; nan where the answers
    about no such prompts were of both kinds."""
    curve: list[float]
    """Validation loss by epoch, mean of the folds."""


def fit(x: Tensor, target: Votes | Pairs, groups: NDArray[np.int64], numbers: Numbers, seed: int) -> Fit:
    """Cross-validates over groups (pictures of one prompt stay together), then fits on everything.

    groups: (n,), the prompt of each picture. The number of epochs is the one with the least mean validation loss.
    Raises DataError when the answers cannot tell one picture from another, or are about a single prompt.
    """
    _demand_contrast(target)
    from sklearn.model_selection import GroupKFold  # most stages use a head and never fit one

    folds = min(numbers.folds, len(np.unique(groups)))
    curves, tested = [], []
    parts = GroupKFold(folds).split(groups, groups=groups) if folds > 1 else ()
    for number, (train, test) in enumerate(parts):
        inside, outside = _restrict(target, train), _restrict(target, test)
        if not _size(inside) or not _size(outside):
            continue
        losses: list[float] = []
        scores: list[Tensor] = []

        def watch(
            head: Head, outside: Votes | Pairs = outside, losses: list[float] = losses, scores: list[Tensor] = scores
        ) -> None:
            scores.append(head(x))
            losses.append(float(_loss(scores[-1], outside)))

        _train(x, inside, numbers, seed + number, numbers.epochs, watch)
        curves.append(losses)
        tested.append((scores, outside))
    if not curves:
        raise DataError(
            "expected answers about pictures of two prompts or more, got those of one: on some the reward is fitted, "
            "on others it is tried",
            hint=COLLECT,
        )
    curve = np.mean(curves, axis=0)
    best = int(curve.argmin())
    head = _train(x, target, numbers, seed, best + 1, None)
    known = [q for scores, outside in tested if not np.isnan(q := quality(scores[best], outside))]
    return Fit(head, best + 1, float(np.mean(known)) if known else float("nan"), curve.tolist())


def _demand_contrast(target: Votes | Pairs) -> None:
    if not _size(target):
        raise DataError("expected answers that count, got none: unsure and skip say nothing", hint=COLLECT)
    if isinstance(target, Votes):
        votes = target.y[target.weight > 0]
        if float(votes.min()) == float(votes.max()):
            raise DataError(
                f"expected pictures that raters say yes to and others that they say no to, got "
                f"{float(votes[0]):.0%} yes about all {len(votes)}",
                hint=COLLECT,
            )


def quality(scores: Tensor, target: Votes | Pairs) -> float:
    """AUC against the majority vote, or the share of pairs in the right order; nan when there is only one class."""
    if isinstance(target, Pairs):
        return float((scores[target.better] > scores[target.worse]).float().mean())  # nan without a pair
    from sklearn.metrics import roc_auc_score

    known = target.weight > 0
    labels = (target.y[known] >= 0.5).numpy()
    return float(roc_auc_score(labels, scores[known].numpy())) if 0 < labels.sum() < len(labels) else float("nan")


def _train(
    x: Tensor, target: Votes | Pairs, numbers: Numbers, seed: int, epochs: int, watch: Callable[[Head], None] | None
) -> Head:
    g = torch.Generator().manual_seed(seed % 2**63)
    t = _begin(x.shape[1], numbers.hidden, g)
    optimiser = torch.optim.AdamW(t.values(), lr=numbers.lr, weight_decay=numbers.weight_decay)
    left = 1 - numbers.dropout
    for _ in range(epochs):
        mask = torch.empty(len(x), numbers.hidden).bernoulli_(left, generator=g) / left
        loss = _loss(_score(t, x, mask), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if watch:
            watch(_freeze(t, x, isinstance(target, Pairs)))
    return _freeze(t, x, isinstance(target, Pairs))


def _begin(d: int, hidden: int, g: torch.Generator) -> dict[str, Tensor]:
    """The weights that `nn.Linear` begins with, which draws them from the global generator and no other."""

    def drawn(*shape: int, fan_in: int) -> Tensor:
        bound = fan_in**-0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=g).requires_grad_()

    return {
        "in.weight": drawn(hidden, d, fan_in=d),
        "in.bias": drawn(hidden, fan_in=d),
        "out.weight": drawn(1, hidden, fan_in=hidden),
        "out.bias": drawn(1, fan_in=hidden),
    }


def _score(t: dict[str, Tensor], x: Tensor, mask: Tensor | None = None) -> Tensor:
    """(n, d) → (n,). mask (n, hidden): dropout, in training."""
    hidden = F.gelu(F.linear(x, t["in.weight"], t["in.bias"]))
    return F.linear(hidden if mask is None else hidden * mask, t["out.weight"], t["out.bias"]).squeeze(-1)


def _freeze(t: dict[str, Tensor], x: Tensor, rank: bool) -> Head:
    tensors = {n: w.detach().clone() for n, w in t.items()}
    plain = Head(tensors | {"mean": torch.tensor(0.0), "std": torch.tensor(1.0)}, rank)
    if not rank:
        return plain
    r = plain(x)
    return Head(tensors | {"mean": r.mean(), "std": r.std().clamp(min=1e-6)}, rank)


def _loss(r: Tensor, target: Votes | Pairs) -> Tensor:
    if isinstance(target, Pairs):
        log_p = F.logsigmoid(r[target.better] - r[target.worse])
        return -(target.weight * log_p).sum() / target.weight.sum().clamp(min=1e-6)
    return (target.weight * (r - target.y).square()).sum() / target.weight.sum().clamp(min=1e-6)


def _restrict(target: Votes | Pairs, rows: NDArray[np.int64]) -> Votes | Pairs:
    """Only what the given rows say: other votes weigh nothing, pairs need both pictures inside."""
    if isinstance(target, Pairs):
        inside = torch.zeros(int(max(target.better.max(), target.worse.max(), rows.max())) + 1, dtype=torch.bool)
        inside[torch.from_numpy(rows)] = True
        both = inside[target.better] & inside[target.worse]
        return Pairs(target.better[both], target.worse[both], target.weight[both])
    mask = torch.zeros_like(target.weight)
    mask[torch.from_numpy(rows)] = 1
    return Votes(target.y, target.weight * mask)


def _size(target: Votes | Pairs) -> float:
    return float(target.weight.sum())

"""The reward head recovers vote shares and rankings, and generalises to held-out prompts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.model_selection import GroupKFold
from torch import nn

from deleatur.feedback.reward import PairTargets, RewardHead, RewardHyperparameters, VoteTargets, fit, quality
from deleatur.feedback.reward import _loss as loss
from deleatur.feedback.reward import _train as train_network

HYPERPARAMETERS = RewardHyperparameters(hidden=16, epochs=150, lr=1e-2, folds=4)


def features(n: int, d: int = 6) -> torch.Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(x, dim=1)


def test_votes_are_recovered_on_held_out_prompts() -> None:
    x = features(240)
    y = torch.sigmoid(6 * x[:, 0])
    groups = np.arange(240) // 4
    result = fit(x, VoteTargets(y, torch.ones(240)), groups, HYPERPARAMETERS, seed=0)
    assert result.held_out_quality > 0.95
    assert (result.head(x) - y).abs().mean() < 0.1


def test_disagreement_is_preserved() -> None:
    """The Brier score's minimiser is the vote share: images with a share of one half are scored near one half."""
    x = torch.nn.functional.normalize(torch.eye(3).repeat(40, 1) + 0.01 * features(120, 3), dim=1)
    y = torch.tensor([0.0, 0.5, 1.0]).repeat(40)
    head = fit(x, VoteTargets(y, torch.ones(120)), np.arange(120), HYPERPARAMETERS, seed=0).head
    assert head(x[1::3]).mean() == pytest.approx(0.5, abs=0.1)


def test_rankings_are_recovered_and_scores_are_standardised() -> None:
    x = features(100)
    order = x[:, 0].argsort()
    g = torch.Generator().manual_seed(1)
    i, j = torch.randint(100, (2, 600), generator=g)
    rank = torch.empty(100).scatter(0, order, torch.arange(100.0))
    is_better = rank[i] > rank[j]
    different = i != j
    better, worse = torch.where(is_better, i, j)[different], torch.where(is_better, j, i)[different]
    result = fit(x, PairTargets(better, worse, torch.ones(len(better))), np.arange(100) // 2, HYPERPARAMETERS, seed=0)
    scores = result.head(x)
    assert scores.mean() == pytest.approx(0, abs=1e-4)
    assert scores.std() == pytest.approx(1, abs=1e-3)
    assert np.corrcoef(scores, x[:, 0])[0, 1] > 0.9


def test_ranking_loss_is_invariant_to_a_constant_offset() -> None:
    r = torch.randn(10, generator=torch.Generator().manual_seed(0))
    pairs = PairTargets(torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]), torch.ones(3))
    assert torch.allclose(loss(r, pairs), loss(r + 7, pairs), atol=1e-5)


def test_head_depends_on_the_seed_and_not_on_the_global_generator() -> None:
    x, y = features(40), torch.rand(40, generator=torch.Generator().manual_seed(2))
    heads: list[RewardHead] = []
    for global_seed in (5, 6):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        heads.append(fit(x, VoteTargets(y, torch.ones(40)), np.arange(40), HYPERPARAMETERS, seed=3).head)
        assert torch.equal(torch.get_rng_state(), before)
    other = fit(x, VoteTargets(y, torch.ones(40)), np.arange(40), HYPERPARAMETERS, seed=4).head
    assert all(torch.equal(heads[0].tensors[n], heads[1].tensors[n]) for n in heads[0].tensors)
    assert not torch.equal(heads[0].tensors["in.weight"], other.tensors["in.weight"])


def test_training_equals_that_of_torch_layers() -> None:
    """The same random numbers in the same order as nn.Linear and nn.Dropout with a seeded global generator."""
    x, y = features(30), torch.rand(30, generator=torch.Generator().manual_seed(2))
    hyperparameters = RewardHyperparameters(hidden=8, dropout=0.3, epochs=20, folds=3, lr=1e-2)
    result = fit(x, VoteTargets(y, torch.ones(30)), np.arange(30), hyperparameters, seed=7)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=1e-2)
        for _ in range(result.epochs):
            optimizer.zero_grad()
            (net(x).squeeze(-1) - y).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            assert torch.allclose(result.head(x), net.eval()(x).squeeze(-1), atol=1e-5)


def test_a_validated_training_is_the_same_training() -> None:
    """Scoring in evaluation mode after every step does not switch dropout off for the next one."""
    x, y = features(30), torch.rand(30, generator=torch.Generator().manual_seed(2))
    arguments = x, VoteTargets(y, torch.ones(30)), RewardHyperparameters(hidden=8, dropout=0.5), 7, 5
    plain, validated = train_network(*arguments), train_network(*arguments, lambda scores: None)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), validated.parameters(), strict=True))


def test_losses_are_weighted_means_by_hand() -> None:
    """Votes: (3 (0.5 − 1)² + 1 (2 − 0)²) / 4. Pairs: −(3 log σ(1.5) + 1 log σ(−1.5)) / 4."""
    r, weight = torch.tensor([0.5, 2.0]), torch.tensor([3.0, 1.0])
    assert float(loss(r, VoteTargets(torch.tensor([1.0, 0.0]), weight))) == pytest.approx(4.75 / 4)
    pairs = PairTargets(torch.tensor([1, 0]), torch.tensor([0, 1]), weight)
    expected = (3 * np.log1p(np.exp(-1.5)) + np.log1p(np.exp(1.5))) / 4
    assert float(loss(r, pairs)) == pytest.approx(expected)


def test_a_tie_of_the_votes_counts_as_yes() -> None:
    scores = torch.tensor([0.1, 0.8])
    assert quality(scores, VoteTargets(torch.tensor([0.4, 0.5]), torch.ones(2))) == 1.0


def test_quality_is_auc_or_pair_accuracy() -> None:
    scores = torch.tensor([0.1, 0.2, 0.8, 0.9])
    assert quality(scores, VoteTargets(torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.ones(4))) == 1.0
    assert np.isnan(quality(scores, VoteTargets(torch.ones(4), torch.ones(4))))
    assert quality(scores, PairTargets(torch.tensor([3, 0]), torch.tensor([0, 3]), torch.ones(2))) == 0.5


def test_votes_with_zero_weight_are_ignored() -> None:
    x = features(60)
    y = (x[:, 0] > 0).float()
    half = torch.arange(60) < 30
    targets = VoteTargets(torch.where(half, y, 1 - y), half.float())
    head = fit(x, targets, np.arange(60), HYPERPARAMETERS, seed=0).head
    assert quality(head(x), VoteTargets(y, torch.ones(60))) > 0.9


def train_reference(
    x: torch.Tensor, targets: VoteTargets | PairTargets, hyperparameters: RewardHyperparameters, seed: int
) -> Iterator[torch.Tensor]:
    """Yields the scores after each step of torch's own layers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(x.shape[1], hyperparameters.hidden), nn.GELU(), nn.Linear(hyperparameters.hidden, 1)
        )
        optimizer = torch.optim.AdamW(net.parameters(), lr=hyperparameters.lr, weight_decay=1e-2)
        for _ in range(hyperparameters.epochs):
            optimizer.zero_grad()
            loss(net(x).squeeze(-1), targets).backward()
            optimizer.step()
            yield net(x).squeeze(-1).detach()


def test_rankings_are_validated_by_the_loss_that_training_minimises() -> None:
    """Of raw scores: standardised ones hide that a head becomes over-confident."""
    x, g = features(40), torch.Generator().manual_seed(1)
    i, j = torch.randint(40, (2, 300), generator=g)
    noisy = x[i, 0] + torch.randn(300, generator=g) > x[j, 0]
    better, worse = torch.where(noisy, i, j)[i != j], torch.where(noisy, j, i)[i != j]
    hyperparameters = RewardHyperparameters(hidden=16, dropout=0, epochs=80, folds=2, lr=3e-2)
    groups = np.arange(40) % 4
    result = fit(x, PairTargets(better, worse, torch.ones(len(better))), groups, hyperparameters, seed=5)

    losses = []
    for fold, (train, test) in enumerate(GroupKFold(2).split(groups, groups=groups)):
        inside = [torch.isin(better, r) & torch.isin(worse, r) for r in map(torch.from_numpy, (train, test))]
        training, validation = (PairTargets(better[m], worse[m], torch.ones(int(m.sum()))) for m in inside)
        losses.append([float(loss(s, validation)) for s in train_reference(x, training, hyperparameters, 5 + fold)])
    expected = np.mean(losses, axis=0)
    assert result.validation_losses == pytest.approx(expected.tolist(), rel=1e-3)
    assert result.epochs == 1 + expected.argmin()
    assert result.epochs < hyperparameters.epochs, "the loss rises again"


def test_each_fold_is_scored_at_the_epoch_that_the_other_folds_select() -> None:
    """At the epoch that suits its own prompts best, the quality of random answers would be above chance."""
    x, g = features(36), torch.Generator().manual_seed(3)
    y = torch.randint(2, (36,), generator=g).float()
    hyperparameters = RewardHyperparameters(hidden=8, dropout=0, epochs=12, folds=3, lr=1e-1)
    groups = np.arange(36) // 2
    result = fit(x, VoteTargets(y, torch.ones(36)), groups, hyperparameters, seed=5)

    losses, qualities = np.empty((3, 12)), np.empty((3, 12))
    for fold, (train, test) in enumerate(GroupKFold(3).split(groups, groups=groups)):
        training, validation = (
            VoteTargets(y, torch.from_numpy(np.isin(np.arange(36), r)).float()) for r in (train, test)
        )
        for epoch, scores in enumerate(train_reference(x, training, hyperparameters, 5 + fold)):
            losses[fold, epoch], qualities[fold, epoch] = loss(scores, validation), quality(scores, validation)
    others = [np.delete(losses, fold, axis=0).sum(0).argmin() for fold in range(3)]
    assert result.held_out_quality == pytest.approx(qualities[range(3), others].mean())
    for optimistic in (qualities[range(3), losses.argmin(1)], qualities[:, losses.sum(0).argmin()], qualities.max(1)):
        assert result.held_out_quality < optimistic.mean() - 0.01

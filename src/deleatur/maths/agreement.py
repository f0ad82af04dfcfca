"""Inter-rater agreement and the reliability of each rater.

Votes are three arrays of equal length: `questions` and `raters` are integer codes from 0, `votes` are 0 or 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Codes = NDArray[np.int64]

# Beta prior of a rater's accuracy, worth five pseudo-answers of which four are correct: a new rater counts with an
# accuracy of 0.8. After fifty answers the prior has little influence.
PRIOR_CORRECT, PRIOR_INCORRECT = 4.0, 1.0


@dataclass(frozen=True)
class OneCoin:
    """A fitted one-coin model."""

    truth: Array
    """Per question: posterior probability that the answer is yes."""
    accuracy: Array
    """Per rater: probability of a correct vote."""


def one_coin(questions: Codes, raters: Codes, votes: Array, *, rounds: int = 200, tol: float = 1e-7) -> OneCoin:
    """Fits the one-coin model of Dawid and Skene (1979) by EM: each rater votes correctly with their own probability.

    E: logit μ_i = logit π + Σ_j ±logit p_j, the sign being rater j's vote    M: p_j = mean agreement with μ, π = mean μ
    Starts from the vote shares, so that EM converges to the majority and not to its mirror image.
    """
    n, n_j = np.bincount(questions), np.bincount(raters)
    mu = np.bincount(questions, votes) / n
    p = np.full(len(n_j), PRIOR_CORRECT / (PRIOR_CORRECT + PRIOR_INCORRECT))
    for _ in range(rounds):
        previous = p
        agree = np.where(votes == 1, mu[questions], 1 - mu[questions])
        p = (np.bincount(raters, agree) + PRIOR_CORRECT) / (n_j + PRIOR_CORRECT + PRIOR_INCORRECT)
        pi = (mu.sum() + 1) / (len(mu) + 2)
        evidence = np.where(votes == 1, 1, -1) * _logit(p)[raters]
        mu = 1 / (1 + np.exp(-(_logit(pi) + np.bincount(questions, evidence)).clip(-500, 500)))
        if np.abs(p - previous).max() < tol:
            break
    return OneCoin(mu, p)


def _logit(p: Array | float) -> Array:
    odds: Array = np.divide(p, np.subtract(1, p))
    return np.log(odds)


def vote_weight(accuracy: Array) -> Array:
    """2p − 1, at least 0: random votes have weight 0, a perfect rater has weight 1.

    The weight of iterative weighted majority voting (Li & Yu 2014, arXiv 1411.4086) for two classes. It orders raters
    as the log odds do, but is bounded, so that no single rater dominates.
    """
    return np.maximum(2 * accuracy - 1, 0.0)


def leave_one_out_agreement(questions: Codes, raters: Codes, votes: Array) -> tuple[Array, Codes]:
    """Per rater: how often they agree with the majority of the *others* (a tie counts half), and on how many questions.

    NaN where no other rater answered the same questions.
    """
    others = np.bincount(questions)[questions] - 1
    yes = np.bincount(questions, votes)[questions] - votes
    agree = np.where(2 * yes == others, 0.5, (2 * yes > others) == (votes == 1))
    compared = np.bincount(raters, others > 0).astype(np.int64)
    total = np.bincount(raters, np.where(others > 0, agree, 0.0))
    return np.divide(total, compared, out=np.full(len(total), np.nan), where=compared > 0), compared


def krippendorff_alpha(units: Codes, values: Codes) -> float:
    """Krippendorff's α for nominal values, α = 1 − D_o / D_e, with missing values (Krippendorff 2011).

    1: perfect agreement; 0: agreement by chance. NaN when no unit has two values, or when all values are equal, where
    the package krippendorff, which gives the same values, raises.
    """
    counts = np.zeros((units.max(initial=-1) + 1, values.max(initial=-1) + 1))
    np.add.at(counts, (units, values), 1)
    counts = counts[counts.sum(1) >= 2]  # a single value can neither agree nor disagree
    m, n_c = counts.sum(1), counts.sum(0)
    observed = ((m**2 - (counts**2).sum(1)) / (m - 1)).sum()
    n = n_c.sum()
    expected = (n**2 - (n_c**2).sum()) / (n - 1) if n else 0.0
    return float(1 - observed / expected) if expected else float("nan")


def mean_kendall_tau(screens: Iterable[Sequence[Array]]) -> tuple[float, int]:
    """Mean Kendall τ-b over all pairs of raters who ranked the same screen, and the number of pairs.

    Each screen is one array of ranks per rater, aligned by image, "X" as infinity. τ-b accounts for ties of X: it is
    the cosine of the two sign vectors, one sign per pair of images. A rater who marked every image X has no τ and is
    skipped. NaN without a pair. Equal to scipy.stats.kendalltau, which takes twelve times as long on small screens.
    """
    signs = ([np.sign(np.subtract(*_rank_pairs(ranks))) for ranks in screen] for screen in screens)
    units = ([s / np.linalg.norm(s) for s in screen if s.any()] for screen in signs)
    taus = [float(a @ b) for screen in units for a, b in combinations(screen, 2)]
    return (float(np.mean(taus)) if taus else float("nan")), len(taus)


def _rank_pairs(ranks: Array) -> tuple[Array, Array]:
    """Ranks of the first and of the second image of each pair; X ranks behind all others, as ∞ − ∞ has no sign."""
    first, second = np.triu_indices(len(ranks), k=1)
    finite = np.where(np.isinf(ranks), len(ranks) + 1, ranks)
    return finite[first], finite[second]

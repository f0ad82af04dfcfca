"""How much raters agree, and how far each can be trusted. Arrays in, numbers out.

A judgement is one entry of three arrays of one length: `questions` and `raters` are codes from 0, `votes` are 0 or 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Codes = NDArray[np.int64]

# Beta prior of a rater's accuracy: five imaginary answers, four of them right. A newcomer counts as a decent rater,
# neither silenced nor made a judge; fifty real answers leave little of it.
RIGHT, WRONG = 4.0, 1.0


@dataclass(frozen=True)
class OneCoin:
    truth: Array
    """Per question: probability that the answer is yes."""
    accuracy: Array
    """Per rater: probability of saying what is true."""


def one_coin(questions: Codes, raters: Codes, votes: Array, *, rounds: int = 200, tol: float = 1e-7) -> OneCoin:
    """The one-coin model of Dawid and Skene (1979) by EM: each rater tells the truth with a probability of their own.

    E: logit μ_i = logit π + Σ_j ±logit p_j, the sign being rater j's vote    M: p_j = mean agreement with μ, π = mean μ
    Starts from the plain shares, so that the majority, not its mirror image, is taken for true.
    """
    n, n_j = np.bincount(questions), np.bincount(raters)
    mu = np.bincount(questions, votes) / n
    p = np.full(len(n_j), RIGHT / (RIGHT + WRONG))
    for _ in range(rounds):
        before = p
        agree = np.where(votes == 1, mu[questions], 1 - mu[questions])
        p = (np.bincount(raters, agree) + RIGHT) / (n_j + RIGHT + WRONG)
        pi = (mu.sum() + 1) / (len(mu) + 2)
        evidence = np.where(votes == 1, 1, -1) * _logit(p)[raters]
        mu = 1 / (1 + np.exp(-(_logit(pi) + np.bincount(questions, evidence)).clip(-500, 500)))
        if np.abs(p - before).max() < tol:
            break
    return OneCoin(mu, p)


def _logit(p: Array | float) -> Array:
    odds: Array = np.divide(p, np.subtract(1, p))
    return np.log(odds)


def weight(accuracy: Array) -> Array:
    """2p − 1, at least 0: a coin-tosser counts nothing, a perfect rater one.

    The weight of iterative weighted majority voting (Li & Yu 2014, arXiv 1411.4086) for two classes. It orders raters
    as the log odds do, but stays bounded, so that no single rater drowns the others.
    """
    return np.maximum(2 * accuracy - 1, 0.0)


def leave_one_out(questions: Codes, raters: Codes, votes: Array) -> tuple[Array, Codes]:
    """Per rater: how often they said what most of the *others* said (a tie counts half), and on how many questions.

    NaN where nobody else answered the same questions.
    """
    others = np.bincount(questions)[questions] - 1
    yes = np.bincount(questions, votes)[questions] - votes
    agree = np.where(2 * yes == others, 0.5, (2 * yes > others) == (votes == 1))
    compared = np.bincount(raters, others > 0).astype(np.int64)
    total = np.bincount(raters, np.where(others > 0, agree, 0.0))
    return np.divide(total, compared, out=np.full(len(total), np.nan), where=compared > 0), compared


def alpha(units: Codes, values: Codes) -> float:
    """Krippendorff's α for nominal values, α = 1 − D_o / D_e; raters may miss any unit (Krippendorff 2011).

    1: they always agree; 0: as if by chance. NaN when no unit has two values, or when all the values are the same.
    """
    counts = np.zeros((units.max(initial=-1) + 1, values.max(initial=-1) + 1))
    np.add.at(counts, (units, values), 1)
    counts = counts[counts.sum(1) >= 2]  # a value that stands alone can neither agree nor disagree
    m, n_c = counts.sum(1), counts.sum(0)
    observed = ((m**2 - (counts**2).sum(1)) / (m - 1)).sum()
    n = n_c.sum()
    by_chance = (n**2 - (n_c**2).sum()) / (n - 1) if n else 0.0
    return float(1 - observed / by_chance) if by_chance else float("nan")


def mean_tau(screens: Iterable[Sequence[Array]]) -> tuple[float, int]:
    """Mean Kendall τ-b over all pairs of raters who ranked the same screen, and how many pairs there were.

    Each screen holds one array of ranks per rater, aligned by picture, "X" as infinity. τ-b takes the ties of X-s into
    account: it is the cosine between the two vectors of signs, one sign for each two pictures. A pair in which somebody
    called everything X has no τ and is left out. NaN without a pair.
    """
    signs = ([np.sign(np.subtract(*_each_two(ranks))) for ranks in screen] for screen in screens)
    units = ([s / np.linalg.norm(s) for s in screen if s.any()] for screen in signs)
    taus = [float(a @ b) for screen in units for a, b in combinations(screen, 2)]
    return (float(np.mean(taus)) if taus else float("nan")), len(taus)


def _each_two(ranks: Array) -> tuple[Array, Array]:
    """Ranks of the first and of the second of each two pictures; X one below the last number, as ∞ − ∞ has no sign."""
    first, second = np.triu_indices(len(ranks), k=1)
    finite = np.where(np.isinf(ranks), len(ranks) + 1, ranks)
    return finite[first], finite[second]

"""Intervals of shares, means and paired differences when pictures come in clusters, one cluster per prompt.

Pictures of one prompt resemble each other, so n pictures of few prompts are not n observations. Two things follow,
and every interval here pays for both: the variance is larger (`design_effect`), and how much larger is itself known
from few prompts only (Student's t with prompts − 1 degrees of freedom). When the prompt itself is the subject, give
every picture a cluster of its own.

n: pictures          G: clusters          y: values          z, t: quantiles of the normal and of Student's t
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit  # quantiles; scipy.stats takes ten times as long to import

Array = NDArray[np.float64]
Clusters = NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


def design_effect(values: Array, clusters: Clusters) -> float:
    """How much less a clustered sample says than an independent one (Kish 1965): variance ratio, at least 1.

    G/(G−1) Σ_g (Σ_{i∈g} y_i − ȳ)² / n²   over   s²/n; exactly 1 when every picture has a cluster of its own.
    One cluster is one observation. Values that are all equal say nothing about it, and count as independent.
    """
    n, groups = len(values), np.unique(clusters).size
    if groups < 2:
        return float(n)
    independent = values.var(ddof=1) / n
    if independent == 0:
        return 1.0
    sums = np.bincount(np.unique(clusters, return_inverse=True)[1], weights=values - values.mean())
    clustered = groups / (groups - 1) * np.square(sums).sum() / n**2
    return float(max(1.0, clustered / independent))


def effective_size(values: Array, clusters: Clusters, level: float = 0.95) -> float:
    """The number of independent pictures that would say as much (Korn & Graubard 1998).

    n / design effect · (t_{n−1} / t_{G−1})²: the second factor is what keeps "0 of 50", where no design effect can
    be seen, from looking equally sure with 50 prompts (50 pictures' worth) and with 5 (26 pictures' worth).
    """
    n, groups = len(values), np.unique(clusters).size
    if groups < 2:
        return 1.0
    t = stdtrit([n - 1, groups - 1], 0.5 + level / 2)
    return float(n / design_effect(values, clusters) * (t[0] / t[1]) ** 2)


def rate(values: Array, clusters: Clusters, level: float = 0.95) -> Interval:
    """A share of yes-es (1) among answers (0 or 1) with its Wilson score interval at the effective sample size."""
    n, z = effective_size(values, clusters, level), _normal(level)
    p = float(values.mean())
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def mean(values: Array, clusters: Clusters, level: float = 0.95) -> Interval:
    """A mean with its t interval over clusters. Of fewer than two clusters nothing is known: the whole real line."""
    n, m, groups = len(values), float(values.mean()), np.unique(clusters).size
    if groups < 2:
        return Interval(m, -math.inf, math.inf)
    error = math.sqrt(values.var(ddof=1) / n * design_effect(values, clusters))
    half = float(stdtrit(groups - 1, 0.5 + level / 2)) * error
    return Interval(m, m - half, m + half)


def difference(values: Array, clusters: Clusters, level: float = 0.95) -> Interval:
    """The mean of paired differences (from equal noise) with its interval.

    Differences of yes/no answers (all −1, 0 or 1): Bonett & Price 2012, the Wald interval after adding one to each of
    the two discordant counts and two to n, at the effective sample size; so "no pair differs" has a width too.
    Anything else: the t interval of `mean`.
    """
    if not np.isin(values, (-1, 0, 1)).all():
        return mean(values, clusters, level)
    n, z = effective_size(values, clusters, level), _normal(level)
    gained, lost = ((n * float((values == sign).mean()) + 1) / (n + 2) for sign in (1, -1))
    centre = gained - lost
    half = z * math.sqrt((gained + lost - centre**2) / (n + 2))
    return Interval(float(values.mean()), max(-1.0, centre - half), min(1.0, centre + half))


def size_to_clear(value: float, end: float, limit: float, n: int, *, share: bool) -> int | None:
    """About how many pictures it takes until the interval's `end` reaches `limit`, if the value stays what it is.

    `share`: the numbers are shares, and the end is Wilson's, which solves n (end − value)² = z² end (1 − end); so the
    answer needs neither z nor the design effect, which stays what it was. Otherwise the width goes as 1/√n.
    None when the value is not on the near side of the limit, or so close that nobody draws so many pictures (10⁹).
    """
    if (limit - value) * (end - value) <= 0:
        return None
    spread = limit * (1 - limit) / (end * (1 - end)) if share and 0 < end < 1 else 1.0
    ratio = (end - value) / (limit - value)
    size = n * spread * ratio * ratio
    return math.ceil(size - 1e-9) if size <= 1e9 else None


def _normal(level: float) -> float:
    return float(ndtri(0.5 + level / 2))

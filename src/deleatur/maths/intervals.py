"""Confidence intervals of proportions, means and paired differences of clustered images, one cluster per prompt.

Images of one prompt resemble each other, so n images of few prompts are fewer than n independent observations. All
intervals account for two consequences: the variance is larger (`design_effect`), and it is itself estimated from few
prompts (Student's t with prompts − 1 degrees of freedom). To treat images as independent, give each its own cluster.

n: images          G: clusters          y: values          z, t: quantiles of the normal and of Student's t
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
    """A point estimate with its confidence interval."""

    value: float
    low: float
    high: float


def design_effect(values: Array, clusters: Clusters) -> float:
    """Variance of the mean of clustered values relative to independent ones (Kish 1965), at least 1.

    G/(G−1) Σ_g (Σ_{i∈g} y_i − ȳ)² / n²   over   s²/n; exactly 1 when every image is its own cluster.
    One cluster counts as one observation. Equal values carry no information on it and count as independent.
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
    """Effective sample size: the number of independent images with the same precision (Korn & Graubard 1998).

    n / design effect · (t_{n−1} / t_{G−1})². The second factor matters where no design effect can be observed: "0 of
    50" counts as 50 independent images when it comes from 50 prompts, and as 26 when it comes from 5.
    """
    n, groups = len(values), np.unique(clusters).size
    if groups < 2:
        return 1.0
    t = stdtrit([n - 1, groups - 1], 0.5 + level / 2)
    return float(n / design_effect(values, clusters) * (t[0] / t[1]) ** 2)


def rate(values: Array, clusters: Clusters, level: float = 0.95) -> Interval:
    """A proportion of binary values (0 or 1) with its Wilson score interval at the effective sample size."""
    n, z = effective_size(values, clusters, level), _normal(level)
    p = float(values.mean())
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def mean(values: Array, clusters: Clusters, level: float = 0.95) -> Interval:
    """A mean with its t interval over clusters; infinite for fewer than two clusters."""
    n, m, groups = len(values), float(values.mean()), np.unique(clusters).size
    if groups < 2:
        return Interval(m, -math.inf, math.inf)
    error = math.sqrt(values.var(ddof=1) / n * design_effect(values, clusters))
    half = float(stdtrit(groups - 1, 0.5 + level / 2)) * error
    return Interval(m, m - half, m + half)


def difference(values: Array, clusters: Clusters, level: float = 0.95) -> Interval:
    """The mean of paired differences (from equal noise) with its interval.

    Differences of binary values (all −1, 0 or 1): Bonett & Price 2012, the Wald interval after adding one to each of
    the two discordant counts and two to n, at the effective sample size; so "no pair differs" has a width too.
    Other values: the t interval of `mean`.
    """
    if not np.isin(values, (-1, 0, 1)).all():
        return mean(values, clusters, level)
    n, z = effective_size(values, clusters, level), _normal(level)
    gained, lost = ((n * float((values == sign).mean()) + 1) / (n + 2) for sign in (1, -1))
    centre = gained - lost
    half = z * math.sqrt((gained + lost - centre**2) / (n + 2))
    return Interval(float(values.mean()), max(-1.0, centre - half), min(1.0, centre + half))


def sample_size_to_reach(value: float, end: float, limit: float, n: int, *, proportion: bool) -> int | None:
    """About how many images it takes until the interval's `end` reaches `limit`, if the value stays the same.

    `proportion`: the values are proportions and the end is Wilson's, which solves n (end − value)² = z² end (1 − end),
    so neither z nor the (unchanged) design effect is needed. Otherwise the width scales as 1/√n.
    None when the value is not on the near side of the limit, or when it would take more than 10⁹ images.
    """
    if (limit - value) * (end - value) <= 0:
        return None
    spread = limit * (1 - limit) / (end * (1 - end)) if proportion and 0 < end < 1 else 1.0
    ratio = (end - value) / (limit - value)
    size = n * spread * ratio * ratio
    return math.ceil(size - 1e-9) if size <= 1e9 else None


def _normal(level: float) -> float:
    return float(ndtri(0.5 + level / 2))

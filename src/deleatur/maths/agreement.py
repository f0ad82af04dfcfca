"""Intervals, and how much several answers agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


def design_effect(values: Array, clusters: NDArray[np.int64]) -> float:
    """How much less a clustered sample says than an independent one (Kish 1965): variance ratio, at least 1.

    Pictures of one prompt resemble each other, so n pictures of few prompts are not n observations.
    """
    n, mean = len(values), values.mean()
    independent = values.var() / n
    sums = np.bincount(clusters, weights=values - mean)
    groups = np.unique(clusters).size
    if independent == 0 or groups < 2:
        return 1.0
    clustered = groups / (groups - 1) * np.square(sums).sum() / n**2
    return float(max(1.0, clustered / independent))


def rate(values: Array, clusters: NDArray[np.int64], level: float = 0.95) -> Interval:
    """A share of yes-es with its Wilson score interval, the sample size divided by the design effect."""
    n_eff = len(values) / design_effect(values, clusters)
    p, z = float(values.mean()), float(stats.norm.ppf(0.5 + level / 2))
    centre = (p + z * z / (2 * n_eff)) / (1 + z * z / n_eff)
    half = z / (1 + z * z / n_eff) * np.sqrt(p * (1 - p) / n_eff + z * z / (4 * n_eff * n_eff))
    return Interval(p, max(0.0, float(centre - half)), min(1.0, float(centre + half)))


def mean(values: Array, clusters: NDArray[np.int64], level: float = 0.95) -> Interval:
    """A mean with its t interval over clusters; also the paired difference, when `values` are differences."""
    n, m = len(values), float(values.mean())
    groups = np.unique(clusters).size
    if n < 2:
        return Interval(m, -np.inf, np.inf)
    error = np.sqrt(values.var(ddof=1) / n * design_effect(values, clusters))
    half = float(stats.t.ppf(0.5 + level / 2, max(groups - 1, 1)) * error)
    return Interval(m, m - half, m + half)

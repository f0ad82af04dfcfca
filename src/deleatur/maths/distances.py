"""Distances between sets and pairs of images, from their features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to feature rows x (n, d) and y (m, d) (Heusel et al. 2017, eq. 6).

    |μ_x − μ_y|² + tr(Σ_x + Σ_y − 2 (Σ_x Σ_y)^½), in float64. With Σ_x = A_xᵀ A_x and Σ_y = A_yᵀ A_y, the trace of the
    square root is the sum of the singular values of A_x A_yᵀ: no (d, d) covariance is formed, so few rows are cheap.
    """
    x, y = x.double(), y.double()
    a_x, a_y = _factor(x), _factor(y)
    cross = torch.linalg.svdvals(a_x @ a_y.T).sum()
    mean = (x.mean(0) - y.mean(0)).square().sum()
    return float(mean + a_x.square().sum() + a_y.square().sum() - 2 * cross)


def _factor(x: Tensor) -> Tensor:
    """A (≤ d, d) with AᵀA = Σ, from rows x (n, d)."""
    a = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    out: Tensor = torch.linalg.qr(a, mode="r").R if len(a) > a.shape[1] else a
    return out


def cosine_similarity(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of matching rows, (n,)."""
    return F.cosine_similarity(x, y, dim=-1)

"""Distances between sets and pairs of pictures, from their features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def frechet(x: Tensor, y: Tensor) -> float:
    """Fréchet distance of two Gaussians fitted to feature rows x (n, d) and y (m, d) (Heusel et al. 2017, eq. 6).

    |μ_x − μ_y|² + tr(Σ_x + Σ_y − 2 (Σ_x Σ_y)^½), in float64; the trace of the root is the sum of the square roots
    of the eigenvalues of Σ_x Σ_y, taken from the symmetric Σ_x^½ Σ_y Σ_x^½.
    """
    x, y = x.double(), y.double()
    mean = (x.mean(0) - y.mean(0)).square().sum()
    cov_x, cov_y = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(cov_x)
    root_x = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root_x @ cov_y @ root_x).clamp(min=0).sqrt().sum()
    return float(mean + cov_x.trace() + cov_y.trace() - 2 * cross)


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosine of matching rows, (n,)."""
    return F.cosine_similarity(x, y, dim=-1)

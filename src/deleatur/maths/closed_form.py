"""Editing projections by a formula: ridge regression on the states that they read.

W_l: (o_l, d) key and value projections of a network, l = 1 … m      M: (d, d) what has been done to all of them
c: states to erase      g: where they are led      k: states to preserve      (rows, (n, d), everywhere here)

min over W'  η_e Σ ‖W'c − Wg‖²  +  η_p Σ ‖W'k − Wk‖²  +  λ ‖W' − W‖²

Each target is the old value of another state, so one matrix answers for every l: W' = W (I + T), where T is the ridge
regression from states to the shift that is wanted of them, g − c or 0. All that follows is (d, d): the projections
themselves enter once, in Σ_l W_lᵀW_l, and once more when the edit is written down. In float64: sums of hundreds of
states of norm √d against a λ of a tenth leave float32 few digits.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def ridge(x: Tensor, y: Tensor, lam: float) -> Tensor:
    """T (e, d) that minimises ‖x Tᵀ − y‖² + λ‖T‖² for x (n, d), y (n, e).

    yᵀ (xxᵀ + λI)⁻¹ x = yᵀx (xᵀx + λI)⁻¹: of the two systems, n × n and d × d, the smaller one is solved.
    """
    n, d = x.shape
    if n < d:
        return y.T @ _solve(x @ x.T, lam, x)
    return _solve(x.T @ x, lam, x.T @ y).T


def shift(c: Tensor, g: Tensor, k: Tensor, *, erase: float, preserve: float, lam: float) -> Tensor:
    """T (d, d) of W' = W (I + T) (UCE, arXiv 2308.14761). erase: η_e, preserve: η_p. Its rank is at most len(c)."""
    a, b = erase**0.5, preserve**0.5
    return ridge(torch.cat([a * c, b * k]), torch.cat([a * (g - c), torch.zeros_like(k)]), lam)


def gram(projections: Iterable[Tensor]) -> Tensor:
    """Σ_l W_lᵀW_l (d, d)."""
    return torch.stack([w.T @ w for w in projections]).sum(0)


def regenerate(gram: Tensor, m: Tensor, c: Tensor, lam: float) -> Tensor:
    """x (n, d) that brings the old values of c back in the edited model (RECE, arXiv 2407.12383).

    argmin Σ_l ‖W_l M x − W_l c‖² + λ‖x‖²; λ keeps x at an ordinary length, and with it the edit that answers x.
    """
    return _solve(m.T @ gram @ m, lam, m.T @ gram @ c.T).T


def apart(gram: Tensor, x: Tensor, y: Tensor) -> float:
    """Σ_l ‖W_l x − W_l y‖² over all rows: how far apart two sets of states are to the projections."""
    return float(((x - y) @ gram * (x - y)).sum())


def factors(t: Tensor, tolerance: float = 1e-6) -> tuple[Tensor, Tensor]:
    """T ≈ left @ right, (d, r) and (r, d), without the singular values that are below `tolerance` of the largest."""
    u, s, vh = torch.linalg.svd(t)
    r = int((s > tolerance * s[0]).sum())
    return u[:, :r] * s[:r], vh[:r]


def _solve(a: Tensor, lam: float, b: Tensor) -> Tensor:
    """(a + λI)⁻¹ b for a positive semi-definite."""
    factor = torch.linalg.cholesky(a + lam * torch.eye(len(a), dtype=a.dtype, device=a.device))
    return torch.cholesky_solve(b, factor)

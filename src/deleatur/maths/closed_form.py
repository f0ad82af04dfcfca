"""Closed-form editing of projection matrices: ridge regression on their input states.

W_l: (o_l, d) key and value projections of a network, l = 1 … m      M: (d, d) edit applied to all of them so far
c: states to erase      g: target states      k: states to preserve      (rows (n, d) throughout)

min over W'  η_e Σ ‖W'c − Wg‖²  +  η_p Σ ‖W'k − Wk‖²  +  λ ‖W' − W‖²

Each target is the old output for another state, so one matrix solves the problem for every l: W' = W (I + T), where T
is the ridge regression from states to their desired shift, g − c or 0. All matrices below are (d, d); the projections
enter only in Σ_l W_lᵀW_l and when the edit is applied. In float64: sums of hundreds of states of norm √d against
λ = 0.1 leave float32 few significant digits.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from deleatur.errors import ErasureRefused


def ridge(x: Tensor, y: Tensor, lam: float) -> Tensor:
    """T (e, d) that minimises ‖x Tᵀ − y‖² + λ‖T‖² for x (n, d), y (n, e).

    yᵀ (xxᵀ + λI)⁻¹ x = yᵀx (xᵀx + λI)⁻¹: solves the smaller of the two systems, n × n and d × d.
    """
    n, d = x.shape
    if n < d:
        return y.T @ _solve(x @ x.T, lam, x)
    return _solve(x.T @ x, lam, x.T @ y).T


def edit_matrix(c: Tensor, g: Tensor, k: Tensor, *, erase: float, preserve: float, lam: float) -> Tensor:
    """T (d, d) of W' = W (I + T) (UCE, arXiv 2308.14761). erase: η_e, preserve: η_p. Its rank is at most len(c)."""
    a, b = erase**0.5, preserve**0.5
    return ridge(torch.cat([a * c, b * k]), torch.cat([a * (g - c), torch.zeros_like(k)]), lam)


def gram(projections: Iterable[Tensor]) -> Tensor:
    """Σ_l W_lᵀW_l (d, d)."""
    return torch.stack([w.T @ w for w in projections]).sum(0)


def regenerate(gram: Tensor, m: Tensor, c: Tensor, lam: float) -> Tensor:
    """States x (n, d) that recover the old outputs of c in the edited model (RECE, arXiv 2407.12383).

    argmin Σ_l ‖W_l M x − W_l c‖² + λ‖x‖²; λ bounds the norm of x, and with it the size of the next edit.
    """
    return _solve(m.T @ gram @ m, lam, m.T @ gram @ c.T).T


def projected_distance(gram: Tensor, x: Tensor, y: Tensor) -> float:
    """Σ_l ‖W_l x − W_l y‖² over all rows: the distance of two sets of states after projection."""
    return float(((x - y) @ gram * (x - y)).sum())


def low_rank_factors(t: Tensor, tolerance: float = 1e-6) -> tuple[Tensor, Tensor]:
    """T ≈ left @ right, (d, r) and (r, d), without singular values below `tolerance` times the largest."""
    u, s, vh = torch.linalg.svd(t)
    r = int((s > tolerance * s[0]).sum())
    return u[:, :r] * s[:r], vh[:r]


def _solve(a: Tensor, lam: float, b: Tensor) -> Tensor:
    """(a + λI)⁻¹ b for positive semi-definite a. Raises ErasureRefused where float64 does not suffice."""
    factor, info = torch.linalg.cholesky_ex(a + lam * torch.eye(len(a), dtype=a.dtype, device=a.device))
    if info:  # also for NaN and infinite entries
        raise ErasureRefused(
            f"expected equations that float64 can solve, got a singular or infinite matrix with a ridge of {lam:g}",
            hint="raise edit.lam (of an epoch of RECE: lam_r), or lower edit.erase; then the same command again",
        )
    return torch.cholesky_solve(b, factor)

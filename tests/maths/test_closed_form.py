"""Closed-form edits against numpy's least squares, the published formula, and hand calculations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from deleatur.maths import closed_form

D = 12
WEIGHTS = {"erase": 2.0, "preserve": 0.3, "lam": 0.5}


def states(n: int, seed: int) -> Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def projections() -> list[Tensor]:
    return [torch.randn(o, D, dtype=torch.float64, generator=torch.Generator().manual_seed(o)) for o in (7, 20)]


EYE = torch.eye(D, dtype=torch.float64)


@pytest.mark.parametrize("n", [3, D, 40])
def test_ridge_equals_least_squares_on_augmented_rows(n: int) -> None:
    """n < d is solved as n × n (dual), n ≥ d as d × d (primal)."""
    x, y, lam = states(n, 1), states(n, 2)[:, :5], 0.7
    rows = np.concatenate([x.numpy(), np.sqrt(lam) * np.eye(D)])
    expected = np.linalg.lstsq(rows, np.concatenate([y.numpy(), np.zeros((D, 5))]), rcond=None)[0].T
    assert np.allclose(closed_form.ridge(x, y, lam), expected, atol=1e-12)


def test_dual_equals_primal() -> None:
    x, y = states(D - 1, 1), states(D - 1, 2)
    padded = [torch.cat([a, torch.zeros(4, D, dtype=a.dtype)]) for a in (x, y)]  # rows of zeros change nothing
    assert torch.allclose(closed_form.ridge(x, y, 0.3), closed_form.ridge(*padded, 0.3), atol=1e-12)


@pytest.mark.parametrize("preserved", [2, 30])
def test_edit_matrix_equals_the_published_formula(preserved: int) -> None:
    """W' = (λW + η_e Σ vcᵀ + η_p Σ Wk kᵀ) (λI + η_e Σ ccᵀ + η_p Σ kkᵀ)⁻¹, v = Wg."""
    c, g, k = states(4, 1), states(4, 2), states(preserved, 3)
    t = closed_form.edit_matrix(c, g, k, **WEIGHTS)
    e, p, lam = WEIGHTS.values()
    right = lam * EYE + e * c.T @ c + p * k.T @ k
    for w in projections():
        left = lam * w + e * (w @ g.T) @ c + p * (w @ k.T) @ k
        assert torch.allclose(w + w @ t, left @ right.inverse(), atol=1e-10)


def test_the_gradient_of_the_objective_vanishes_at_the_edit() -> None:
    c, g, k = states(4, 1), states(4, 2), states(6, 3)
    t = closed_form.edit_matrix(c, g, k, **WEIGHTS)
    for w in projections():

        def gradient(point: Tensor, w: Tensor = w) -> float:
            edited = point.clone().requires_grad_()
            erased = (c @ edited.T - g @ w.T).square().sum()
            preserved = (k @ edited.T - k @ w.T).square().sum()
            loss = (
                WEIGHTS["erase"] * erased
                + WEIGHTS["preserve"] * preserved
                + WEIGHTS["lam"] * (edited - w).square().sum()
            )
            return float(torch.autograd.grad(loss, edited)[0].abs().max())

        assert gradient(w) > 1
        assert gradient(w + w @ t) < 1e-10


def test_edit_matrix_of_one_state_by_hand() -> None:
    """c = (3, 0), g = (0, 1), η = 2, λ = 2: T = η (g − c) cᵀ / (λ + η‖c‖²), and 1/10 = λ / (λ + η‖c‖²) of c remains."""
    c, g = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    t = closed_form.edit_matrix(c, g, torch.zeros(0, 2), erase=2.0, preserve=1.0, lam=2.0)
    assert torch.allclose(t, torch.tensor([[-0.9, 0.0], [0.3, 0.0]]))
    assert torch.allclose(c + c @ t.T, torch.tensor([[0.3, 0.9]]))


def test_rank_is_at_most_the_number_of_erased_states() -> None:
    t = closed_form.edit_matrix(states(3, 1), states(3, 2), states(40, 3), **WEIGHTS)
    left, right = closed_form.low_rank_factors(t)
    assert left.shape == (D, 3)
    assert right.shape == (3, D)
    assert torch.allclose(left @ right, t, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_the_rank_does_not_depend_on_the_scale(scale: float) -> None:
    """What counts as zero is relative to the largest singular value: here 1, 0.1 and, far below it, 1e-8."""
    u, v = (torch.linalg.qr(states(D, seed))[0][:, :3] for seed in (1, 2))
    t = scale * (u * torch.tensor([1.0, 0.1, 1e-8], dtype=torch.float64)) @ v.T
    left, right = closed_form.low_rank_factors(t)
    assert left.shape == (D, 2)
    assert torch.allclose(left @ right / scale, t / scale, rtol=0, atol=1e-7)


def test_targets_equal_to_the_states_give_a_zero_edit() -> None:
    c = states(4, 1)
    t = closed_form.edit_matrix(c, c, states(5, 3), **WEIGHTS)
    assert torch.equal(t, torch.zeros_like(t))
    assert closed_form.low_rank_factors(t)[0].shape == (D, 0)


def test_a_larger_preservation_weight_reduces_drift() -> None:
    c, g, k = states(4, 1), states(4, 2), states(5, 3)

    def drift(eta_p: float) -> float:
        return float((k @ closed_form.edit_matrix(c, g, k, erase=1.0, preserve=eta_p, lam=0.1).T).norm() / k.norm())

    free, light, heavy = (drift(p) for p in (0.0, 1.0, 1e6))
    assert free > 0.3, "the effect exists"
    assert heavy < 1e-5 < light < free


def test_edit_matrix_is_invariant_to_scale_and_order() -> None:
    c, g, k = states(4, 1), states(4, 2), states(5, 3)
    one = closed_form.edit_matrix(c, g, k, **WEIGHTS)
    scaled = closed_form.edit_matrix(3 * c, 3 * g, 3 * k, **WEIGHTS | {"lam": 9 * WEIGHTS["lam"]})
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(one, scaled, atol=1e-12)
    assert torch.allclose(one, closed_form.edit_matrix(c[order], g[order], k, **WEIGHTS), atol=1e-12)


def test_regenerate_of_the_unedited_model_returns_the_states() -> None:
    c = states(5, 1)
    x = closed_form.regenerate(closed_form.gram(projections()), EYE, c, 1e-9)
    assert x.shape == c.shape
    assert torch.allclose(x, c, atol=1e-6)


def test_regenerate_equals_least_squares_over_all_projections() -> None:
    c, lam, all_w = states(5, 1), 0.2, projections()
    m = EYE + closed_form.edit_matrix(states(4, 1), states(4, 2), states(3, 3), **WEIGHTS)
    rows = np.concatenate([*((w @ m).numpy() for w in all_w), np.sqrt(lam) * np.eye(D)])
    values = np.concatenate([*((w @ c.T).numpy() for w in all_w), np.zeros((D, 5))])
    expected = np.linalg.lstsq(rows, values, rcond=None)[0].T
    assert np.allclose(closed_form.regenerate(closed_form.gram(all_w), m, c, lam), expected, atol=1e-10)


def test_erasing_regenerated_states_moves_the_concept_further_away() -> None:
    c, g, k = states(4, 1), states(4, 2), states(3, 3)
    gram, weights = closed_form.gram(projections()), {"erase": 1.0, "preserve": 0.1, "lam": 0.1}
    m = EYE + closed_form.edit_matrix(c, g, k, **weights)
    x = closed_form.regenerate(gram, m, c, 0.1)
    edited_again = m + m @ closed_form.edit_matrix(x, g, k, **weights)
    before, after = (closed_form.projected_distance(gram, x @ w.T, c) for w in (m, edited_again))
    unaided = closed_form.projected_distance(gram, c @ m.T, c)
    assert before < 0.5 * unaided, "the regenerated states recover the concept, its own states do not"
    assert after > 2 * before


def test_projected_distance_is_the_sum_over_projections() -> None:
    x, y, all_w = states(3, 1), states(3, 2), projections()
    expected = sum(float(((x - y) @ w.T).square().sum()) for w in all_w)
    assert closed_form.projected_distance(closed_form.gram(all_w), x, y) == pytest.approx(expected)

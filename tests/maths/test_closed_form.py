"""The formulas against least squares by numpy, against the published form, and against hand calculations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from deleatur.maths import closed_form

D = 12
NUMBERS = {"erase": 2.0, "preserve": 0.3, "lam": 0.5}


def states(n: int, seed: int) -> Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def projections() -> list[Tensor]:
    return [torch.randn(o, D, dtype=torch.float64, generator=torch.Generator().manual_seed(o)) for o in (7, 20)]


EYE = torch.eye(D, dtype=torch.float64)


@pytest.mark.parametrize("n", [3, D, 40])
def test_ridge_is_least_squares_with_the_penalty_as_further_rows(n: int) -> None:
    """n < d is solved as n × n (dual), n ≥ d as d × d (primal): numpy sees neither."""
    x, y, lam = states(n, 1), states(n, 2)[:, :5], 0.7
    rows = np.concatenate([x.numpy(), np.sqrt(lam) * np.eye(D)])
    expected = np.linalg.lstsq(rows, np.concatenate([y.numpy(), np.zeros((D, 5))]), rcond=None)[0].T
    assert np.allclose(closed_form.ridge(x, y, lam), expected, atol=1e-12)


def test_dual_equals_primal() -> None:
    x, y = states(D - 1, 1), states(D - 1, 2)
    padded = [torch.cat([a, torch.zeros(4, D, dtype=a.dtype)]) for a in (x, y)]  # rows of zeros say nothing
    assert torch.allclose(closed_form.ridge(x, y, 0.3), closed_form.ridge(*padded, 0.3), atol=1e-12)


@pytest.mark.parametrize("kept", [2, 30])
def test_shift_is_the_published_formula_for_each_projection(kept: int) -> None:
    """W' = (λW + η_e Σ vcᵀ + η_p Σ Wk kᵀ) (λI + η_e Σ ccᵀ + η_p Σ kkᵀ)⁻¹, v = Wg."""
    c, g, k = states(4, 1), states(4, 2), states(kept, 3)
    t = closed_form.shift(c, g, k, **NUMBERS)
    e, p, lam = NUMBERS.values()
    right = lam * EYE + e * c.T @ c + p * k.T @ k
    for w in projections():
        left = lam * w + e * (w @ g.T) @ c + p * (w @ k.T) @ k
        assert torch.allclose(w + w @ t, left @ right.inverse(), atol=1e-10)


def test_the_objectives_gradient_is_zero_at_the_edit_and_not_before() -> None:
    c, g, k = states(4, 1), states(4, 2), states(6, 3)
    t = closed_form.shift(c, g, k, **NUMBERS)
    for w in projections():

        def gradient(at: Tensor, w: Tensor = w) -> float:
            own = at.clone().requires_grad_()
            erased = (c @ own.T - g @ w.T).square().sum()
            kept = (k @ own.T - k @ w.T).square().sum()
            loss = NUMBERS["erase"] * erased + NUMBERS["preserve"] * kept + NUMBERS["lam"] * (own - w).square().sum()
            return float(torch.autograd.grad(loss, own)[0].abs().max())

        assert gradient(w) > 1
        assert gradient(w + w @ t) < 1e-10


def test_one_state_and_nothing_preserved_by_hand() -> None:
    """c = (3, 0), g = (0, 1), η = 2, λ = 2: T = η (g − c) cᵀ / (λ + η‖c‖²), and λ / (λ + η‖c‖²) = 1/10 is left."""
    c, g = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    t = closed_form.shift(c, g, torch.zeros(0, 2), erase=2.0, preserve=1.0, lam=2.0)
    assert torch.allclose(t, torch.tensor([[-0.9, 0.0], [0.3, 0.0]]))
    assert torch.allclose(c + c @ t.T, torch.tensor([[0.3, 0.9]]))


def test_rank_is_at_most_the_number_of_erased_states() -> None:
    t = closed_form.shift(states(3, 1), states(3, 2), states(40, 3), **NUMBERS)
    left, right = closed_form.factors(t)
    assert left.shape == (D, 3)
    assert right.shape == (3, D)
    assert torch.allclose(left @ right, t, atol=1e-12)


def test_nothing_to_move_moves_nothing() -> None:
    c = states(4, 1)
    t = closed_form.shift(c, c, states(5, 3), **NUMBERS)
    assert torch.equal(t, torch.zeros_like(t))
    assert closed_form.factors(t)[0].shape == (D, 0)


def test_preserved_states_stay_the_better_the_more_they_weigh() -> None:
    c, g, k = states(4, 1), states(4, 2), states(5, 3)

    def drift(eta_p: float) -> float:
        return float((k @ closed_form.shift(c, g, k, erase=1.0, preserve=eta_p, lam=0.1).T).norm() / k.norm())

    free, light, heavy = (drift(p) for p in (0.0, 1.0, 1e6))
    assert free > 0.3, "the effect exists"
    assert heavy < 1e-5 < light < free


def test_scale_and_order_say_nothing() -> None:
    c, g, k = states(4, 1), states(4, 2), states(5, 3)
    one = closed_form.shift(c, g, k, **NUMBERS)
    scaled = closed_form.shift(3 * c, 3 * g, 3 * k, **NUMBERS | {"lam": 9 * NUMBERS["lam"]})
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(one, scaled, atol=1e-12)
    assert torch.allclose(one, closed_form.shift(c[order], g[order], k, **NUMBERS), atol=1e-12)


def test_what_brings_a_state_back_in_the_untouched_model_is_the_state() -> None:
    c = states(5, 1)
    found = closed_form.regenerate(closed_form.gram(projections()), EYE, c, 1e-9)
    assert found.shape == c.shape
    assert torch.allclose(found, c, atol=1e-6)


def test_what_brings_a_state_back_is_least_squares_over_all_projections() -> None:
    c, lam, all_w = states(5, 1), 0.2, projections()
    m = EYE + closed_form.shift(states(4, 1), states(4, 2), states(3, 3), **NUMBERS)
    rows = np.concatenate([*((w @ m).numpy() for w in all_w), np.sqrt(lam) * np.eye(D)])
    values = np.concatenate([*((w @ c.T).numpy() for w in all_w), np.zeros((D, 5))])
    expected = np.linalg.lstsq(rows, values, rcond=None)[0].T
    assert np.allclose(closed_form.regenerate(closed_form.gram(all_w), m, c, lam), expected, atol=1e-10)


def test_erasing_what_was_found_puts_the_concept_further_out_of_reach() -> None:
    c, g, k = states(4, 1), states(4, 2), states(3, 3)
    gram, numbers = closed_form.gram(projections()), {"erase": 1.0, "preserve": 0.1, "lam": 0.1}
    m = EYE + closed_form.shift(c, g, k, **numbers)
    found = closed_form.regenerate(gram, m, c, 0.1)
    again = m + m @ closed_form.shift(found, g, k, **numbers)
    before, after = (closed_form.apart(gram, found @ w.T, c) for w in (m, again))
    unaided = closed_form.apart(gram, c @ m.T, c)
    assert before < 0.5 * unaided, "the found states bring the concept back where its own do not"
    assert after > 2 * before


def test_apart_is_the_sum_over_projections() -> None:
    x, y, all_w = states(3, 1), states(3, 2), projections()
    expected = sum(float(((x - y) @ w.T).square().sum()) for w in all_w)
    assert closed_form.apart(closed_form.gram(all_w), x, y) == pytest.approx(expected)

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg

from deleatur.maths.distances import cosine_similarity, frechet_distance
from deleatur.maths.guidance import cfg
from deleatur.maths.seeds import derive, generator


def test_frechet_distance_equals_the_closed_form_with_scipys_sqrtm() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(300, 5)) + 1
    cx, cy = np.cov(x.T), np.cov(y.T)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(cx + cy - 2 * linalg.sqrtm(cx @ cy).real)
    assert frechet_distance(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_to_itself_is_zero_and_a_shift_counts_squared() -> None:
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + torch.tensor([3.0, 4.0, 0.0])) == pytest.approx(25, rel=1e-5)


def test_cosine_similarity_of_parallel_rows_is_one() -> None:
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(cosine_similarity(x, 3 * x), torch.ones(4))


def test_guidance_scale_one_is_the_conditional_and_zero_the_unconditional_prediction() -> None:
    eps_0, eps_p = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).unbind()
    assert torch.allclose(cfg(eps_0, eps_p, 1.0), eps_p)
    assert torch.equal(cfg(eps_0, eps_p, 0.0), eps_0)


def test_each_purpose_has_its_own_random_numbers() -> None:
    assert derive(42, "sample", "a", 1) == derive(42, "sample", "a", 1)
    assert len({derive(42, "sample", "a", i) for i in range(100)} | {derive(43, "sample", "a", 0)}) == 101
    assert not torch.equal(torch.randn(3, generator=generator(1, "x")), torch.randn(3, generator=generator(1, "y")))

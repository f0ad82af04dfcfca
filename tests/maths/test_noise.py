"""The schedule and the DDIM step against diffusers' own scheduler."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from deleatur.maths.noise import Schedule

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def pair(final_is_one: bool = False, prediction: str = "epsilon") -> tuple[Schedule, DDIMScheduler]:
    theirs = DDIMScheduler(**CONFIG, steps_offset=1, set_alpha_to_one=final_is_one, prediction_type=prediction)
    ours = Schedule(theirs.alphas_cumprod, float(theirs.final_alpha_cumprod), 1, prediction)  # type: ignore[arg-type]
    return ours, theirs


def test_fifty_steps_are_981_961_to_1() -> None:
    ours, theirs = pair()
    assert ours.taus(50) == list(range(981, 0, -20))
    theirs.set_timesteps(50)
    assert ours.taus(50) == theirs.timesteps.tolist()


@pytest.mark.parametrize("final_is_one", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_step_equals_diffusers(final_is_one: bool, prediction: str) -> None:
    ours, theirs = pair(final_is_one, prediction)
    theirs.set_timesteps(8)
    g = torch.Generator().manual_seed(0)
    z, output = torch.randn(2, 4, 3, 3, generator=g), torch.randn(2, 4, 3, 3, generator=g)
    for tau in ours.taus(8):
        t = torch.full((2,), tau)
        expected = theirs.step(output, tau, z).prev_sample
        assert torch.allclose(ours.ddim(z, ours.to_epsilon(output, z, t), t, 8), expected, atol=1e-5)


def test_noise_is_added_as_diffusers_adds_it() -> None:
    ours, theirs = pair()
    g = torch.Generator().manual_seed(0)
    z0, eps, t = torch.randn(3, 4, 2, 2, generator=g), torch.randn(3, 4, 2, 2, generator=g), torch.tensor([1, 500, 999])
    assert torch.equal(ours.add_noise(z0, eps, t), theirs.add_noise(z0, eps, t))


def test_rows_may_be_at_different_levels() -> None:
    ours, _ = pair()
    z, eps = torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)
    both = ours.ddim(z, eps, torch.tensor([981, 1]), 50)
    assert torch.equal(both[0], ours.ddim(z[:1], eps[:1], torch.tensor([981]), 50)[0])
    assert torch.equal(both[1], ours.ddim(z[1:], eps[1:], torch.tensor([1]), 50)[0])

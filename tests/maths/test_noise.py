"""The noise schedule and the DDIM step against diffusers' DDIMScheduler."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from deleatur.maths.noise import NoiseSchedule

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def pair(final_is_one: bool = False, prediction: str = "epsilon") -> tuple[NoiseSchedule, DDIMScheduler]:
    theirs = DDIMScheduler(**CONFIG, steps_offset=1, set_alpha_to_one=final_is_one, prediction_type=prediction)
    ours = NoiseSchedule(theirs.alphas_cumprod, float(theirs.final_alpha_cumprod), 1, prediction)  # type: ignore[arg-type]
    return ours, theirs


def test_fifty_timesteps_are_981_961_to_1() -> None:
    ours, theirs = pair()
    assert ours.timesteps(50) == list(range(981, 0, -20))
    theirs.set_timesteps(50)
    assert ours.timesteps(50) == theirs.timesteps.tolist()


@pytest.mark.parametrize("final_is_one", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_step_equals_diffusers(final_is_one: bool, prediction: str) -> None:
    ours, theirs = pair(final_is_one, prediction)
    theirs.set_timesteps(8)
    g = torch.Generator().manual_seed(0)
    z, output = torch.randn(2, 4, 3, 3, generator=g), torch.randn(2, 4, 3, 3, generator=g)
    for tau in ours.timesteps(8):
        t = torch.full((2,), tau)
        expected = theirs.step(output, tau, z).prev_sample
        assert torch.allclose(ours.ddim_step(z, ours.to_epsilon(output, z, t), t, 8), expected, atol=1e-5)


def test_add_noise_equals_diffusers() -> None:
    ours, theirs = pair()
    g = torch.Generator().manual_seed(0)
    z0, eps, t = torch.randn(3, 4, 2, 2, generator=g), torch.randn(3, 4, 2, 2, generator=g), torch.tensor([1, 500, 999])
    assert torch.equal(ours.add_noise(z0, eps, t), theirs.add_noise(z0, eps, t))


def test_rows_may_be_at_different_timesteps() -> None:
    ours, _ = pair()
    z, eps = torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)
    both = ours.ddim_step(z, eps, torch.tensor([981, 1]), 50)
    assert torch.equal(both[0], ours.ddim_step(z[:1], eps[:1], torch.tensor([981]), 50)[0])
    assert torch.equal(both[1], ours.ddim_step(z[1:], eps[1:], torch.tensor([1]), 50)[0])

"""The noise schedule and the DDIM step against diffusers' DDIMScheduler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from deleatur.errors import SettingsError
from deleatur.maths.noise import NoiseSchedule

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SPACINGS = ["leading", "trailing", "linspace"]


def pair(**options: Any) -> tuple[NoiseSchedule, DDIMScheduler]:
    theirs = DDIMScheduler(**CONFIG, **{"steps_offset": 1, "set_alpha_to_one": False, **options})
    config = theirs.config
    ours = NoiseSchedule(
        theirs.alphas_cumprod,
        float(theirs.final_alpha_cumprod),
        config.steps_offset,
        config.prediction_type,
        config.timestep_spacing,
    )
    return ours, theirs


def test_fifty_timesteps_are_981_961_to_1() -> None:
    assert pair()[0].timesteps(50) == list(range(981, 0, -20))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("total", [1000, 250])
def test_timesteps_of_every_number_of_steps_equal_diffusers(spacing: str, total: int) -> None:
    """diffusers appends a timestep −1 to some trailing ones, by a rounding error."""
    ours, theirs = pair(timestep_spacing=spacing, num_train_timesteps=total, steps_offset=0)
    for n in range(1, total + 1):
        theirs.set_timesteps(n)
        timesteps = ours.timesteps(n)
        assert timesteps == [t for t in theirs.timesteps.tolist() if t >= 0]
        assert len(set(timesteps)) == n


@pytest.mark.parametrize("n", [0, -1, 1001])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_more_steps_than_the_schedule_has_are_refused(n: int, spacing: str) -> None:
    with pytest.raises(SettingsError, match=f"expected 1 to 1000 sampler steps.* got {n}"):
        pair(timestep_spacing=spacing)[0].timesteps(n)


def test_steps_that_begin_beyond_the_schedule_are_refused() -> None:
    ours, _ = pair()
    assert ours.timesteps(999)[0] == 999
    with pytest.raises(SettingsError, match="begin at timestep 1000: expected fewer steps"):
        ours.timesteps(1000)
    assert len(pair(timestep_spacing="trailing")[0].timesteps(1000)) == 1000


@pytest.mark.parametrize("final_is_one", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("prediction", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_a_trajectory_equals_diffusers(prediction: str, spacing: str, final_is_one: bool, zero_snr: bool) -> None:
    ours, theirs = pair(
        set_alpha_to_one=final_is_one,
        prediction_type=prediction,
        timestep_spacing=spacing,
        rescale_betas_zero_snr=zero_snr,
    )
    theirs.set_timesteps(7)  # 1000 / 7 is no integer
    g = torch.Generator().manual_seed(0)
    z = expected = torch.randn(2, 4, 3, 3, generator=g)
    for tau in ours.timesteps(7):
        t = torch.full((2,), tau)
        # A network would return something like noise or v; of unrelated random numbers ẑ₀ would grow without bound.
        output = 0.9 * z + 0.1 * torch.randn(2, 4, 3, 3, generator=g)
        z = ours.ddim_step(z, output, t, 7)
        expected = theirs.step(output, tau, expected).prev_sample
        assert z.isfinite().all()
        assert torch.allclose(z, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_target_equal_diffusers_and_give_the_clean_latents_back(prediction: str) -> None:
    ours, theirs = pair(prediction_type=prediction)
    g = torch.Generator().manual_seed(0)
    z0, eps, t = torch.randn(3, 4, 2, 2, generator=g), torch.randn(3, 4, 2, 2, generator=g), torch.tensor([1, 500, 999])
    z, target = ours.add_noise(z0, eps, t), ours.target(z0, eps, t)
    assert torch.equal(z, theirs.add_noise(z0, eps, t))
    assert torch.equal(target, eps if prediction == "epsilon" else theirs.get_velocity(z0, eps, t))
    assert torch.allclose(ours.predict_z0(z, target, t), z0, atol=1e-4)
    assert torch.allclose(ours.predict_epsilon(z, target, t), eps, atol=1e-4)


def test_rows_may_be_at_different_timesteps() -> None:
    ours, _ = pair()
    z, eps = torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)
    both = ours.ddim_step(z, eps, torch.tensor([981, 1]), 50)
    assert torch.equal(both[0], ours.ddim_step(z[:1], eps[:1], torch.tensor([981]), 50)[0])
    assert torch.equal(both[1], ours.ddim_step(z[1:], eps[1:], torch.tensor([1]), 50)[0])


def test_the_arithmetic_is_in_fp32_whatever_the_latents_precision() -> None:
    """√(1−ᾱ₁) is 0.041; in bfloat16, 1 − ᾱ₁ would be 0."""
    ours, _ = pair()
    zero, eps, t = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), torch.tensor([1])
    noisy = ours.add_noise(zero.bfloat16(), eps, t)
    assert noisy.dtype == torch.float32
    assert float(noisy) == pytest.approx(0.0413, abs=1e-4)
    assert torch.equal(ours.predict_z0(noisy, eps, t), zero)
    assert ours.ddim_step(eps, eps, t, 50).dtype == torch.float32

"""Methods on a v-prediction checkpoint with zero terminal SNR, whose sampler begins where ᾱ is 0."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from plugin_examples import instantiate, random_images

from deleatur import plugins
from deleatur.diffusion import encode
from deleatur.diffusion.model import Model
from deleatur.diffusion.overlay import edited_weights
from deleatur.diffusion.scheduler import noise_schedule
from deleatur.erasers import Eraser
from deleatur.records.model import RatedImages
from deleatur.training.loop import ErasureContext
from deleatur.training.textual_inversion import TextualInversionConfig, TokenTarget, learn_tokens

CONFIG = {
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}


@pytest.fixture(scope="module")
def model() -> Model:
    return replace(tiny.model(), schedule=noise_schedule(CONFIG))


@pytest.mark.parametrize("name", plugins.names("erasers"))
def test_an_eraser_gives_finite_weights(model: Model, name: str) -> None:
    assert model.schedule.timesteps(4)[0] == 999
    assert model.schedule.alphas_cumprod[999] == 0
    concept = encode.concept_from_words(model, "weapon", ["gun"])
    concept = replace(concept, images=RatedImages(random_images(4), random_images(3)))
    eraser: Eraser = instantiate("erasers", name, Eraser)
    delta = eraser.erase(model, [concept], ErasureContext(1, encode.encode_text(model, ["", "a cat"])))
    edited_weights(model, delta)  # refuses NaN
    assert name == "keep" or any(d.abs().sum() > 0 for d in delta.tensors.values())


def test_a_token_learns_v_at_every_timestep(model: Model) -> None:
    """The regression target is v, so that the loss of a network that predicts v exactly is 0, at ᾱ = 0 too."""
    z_0 = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))

    class Exact(torch.nn.Module):
        """Predicts v of the one clean latent that exists: v = (√ᾱ z_t − z₀) / √(1−ᾱ)."""

        dtype = torch.float32

        def forward(self, z: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> object:
            a = model.schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)
            v = (a.sqrt() * z - z_0[:1]) / (1 - a).sqrt() + 0 * c.sum()
            return type("Output", (), {"sample": v})

    unet = Exact()
    unet.register_parameter("weight", torch.nn.Parameter(torch.zeros(1)))
    target = TokenTarget(z_0[:1], torch.ones(1), [["a {}"]], torch.Generator().manual_seed(0))
    config = TextualInversionConfig(iterations=4, batch_size=64)
    [token] = learn_tokens(replace(model, unet=unet), config, [target], torch.zeros(1, 1, tiny.WIDTH))
    assert max(token.losses) < 1e-3

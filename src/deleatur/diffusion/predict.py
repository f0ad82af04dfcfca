"""Noise prediction by the UNet, with its own weights or with edited ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call

from deleatur.diffusion.model import Model
from deleatur.maths.guidance import cfg

Weights = Mapping[str, Tensor]
"""UNet parameter name → tensor that replaces it; other parameters are the base model's. {} is the base model."""


def predict(model: Model, weights: Weights, z: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """The network's output, ε(z, t, c) or v(z, t, c), in fp32, for latents z (B, C, H, W), timesteps t (B,), states
    c (B, L, d) or (1, L, d).

    Latents and outputs are in fp32; only the network's own arithmetic is in its precision.
    One network in memory serves any number of weight sets; the base model is never changed.
    """
    z, c = z.to(model.dtype), c.to(model.dtype).expand(len(z), -1, -1)
    # A UNet ties no weights, and a search for some would take a sixth of a small network's call.
    args = (z, t, c)
    out = functional_call(model.unet, dict(weights), args, tie_weights=False) if weights else model.unet(*args)
    output: Tensor = out.sample.float()
    return output


@torch.no_grad()
def predict_pair(
    model: Model, weights: Weights, z: Tensor, t: Tensor, c_0: Tensor, c_p: Tensor
) -> tuple[Tensor, Tensor]:
    """(ε₀, ε_p): the predictions for the empty prompt and for c_p, in one call of 2B rows."""
    both = torch.cat([c_0.expand(len(z), -1, -1), c_p.expand(len(z), -1, -1)])
    eps_0, eps_p = predict(model, weights, torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
    return eps_0, eps_p


@torch.no_grad()
def guided_step(
    model: Model, weights: Weights, z: Tensor, k: Tensor, c_0: Tensor, c_p: Tensor, s_g: float, n: int
) -> Tensor:
    """z⁽ᵏ⁾ → z⁽ᵏ⁺¹⁾: one DDIM step of the n-step sampler with classifier-free guidance; k (B,): step of each row."""
    t = torch.tensor(model.schedule.timesteps(n), device=z.device)[k]
    return model.schedule.ddim_step(z, cfg(*predict_pair(model, weights, z, t, c_0, c_p), s_g), t, n)

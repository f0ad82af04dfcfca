"""The noise schedule and the deterministic DDIM step (Song et al. 2021, eq. 12 with η = 0).

t: training timestep, 0 … T−1            ᾱ_t: cumulative product of alphas
z_t = √ᾱ_t z₀ + √(1−ᾱ_t) ε               k: completed sampler steps; τ_k: timestep after k steps
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """The parts of a checkpoint's scheduler config that the sampler and the losses use."""

    alphas_cumprod: Tensor
    """(T,) ᾱ."""
    final_alpha_cumprod: float
    """ᾱ after the last step: ᾱ₀, or 1 where the checkpoint sets `set_alpha_to_one`."""
    steps_offset: int
    """1 for Stable Diffusion 1.x."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"

    def timesteps(self, n: int) -> list[int]:
        """τ_0 … τ_{n−1} of the n-step sampler, "leading" spacing: 981, 961, …, 1 for n = 50, T = 1000."""
        stride = len(self.alphas_cumprod) // n
        return [k * stride + self.steps_offset for k in reversed(range(n))]

    def add_noise(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z_t (B, …) of clean latents z₀ (B, …) at timesteps t (B,)."""
        a = self.alphas_cumprod.to(z0)[t].reshape(-1, *[1] * (z0.ndim - 1))
        return a.sqrt() * z0 + (1 - a).sqrt() * eps

    def predict_z0(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z₀ (B, …) of noisy latents z (B, …), given their noise ε."""
        a = self.alphas_cumprod.to(z)[t].reshape(-1, *[1] * (z.ndim - 1))
        return (z - (1 - a).sqrt() * eps) / a.sqrt()

    def ddim_step(self, z: Tensor, eps: Tensor, t: Tensor, n: int) -> Tensor:
        """One step of the n-step sampler from timesteps t (B,) to the next, for latents z (B, …)."""
        t_next = t - len(self.alphas_cumprod) // n
        alphas = self.alphas_cumprod.to(z)
        a_next = torch.where(t_next >= 0, alphas[t_next.clamp(min=0)], alphas.new_tensor(self.final_alpha_cumprod))
        a_next = a_next.reshape(-1, *[1] * (z.ndim - 1))
        z0 = self.predict_z0(z, eps, t)
        return a_next.sqrt() * z0 + (1 - a_next).sqrt() * eps

    def to_epsilon(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """ε of the network's output, for ε-prediction and v-prediction checkpoints."""
        if self.prediction_type == "epsilon":
            return output
        a = self.alphas_cumprod.to(z)[t].reshape(-1, *[1] * (z.ndim - 1))
        return a.sqrt() * output + (1 - a).sqrt() * z

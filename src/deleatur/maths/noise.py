"""The noise schedule and the deterministic DDIM step (Song et al. 2021, eq. 12 with η = 0).

t: training timestep, 0 … T−1            ᾱ_t: cumulative product of alphas
z_t = √ᾱ_t z₀ + √(1−ᾱ_t) ε               k: completed sampler steps; τ_k: timestep after k steps
v_t = √ᾱ_t ε − √(1−ᾱ_t) z₀               what v-prediction checkpoints predict (Salimans & Ho 2022, app. D)

All arithmetic is in fp32, whatever the network's precision: in bfloat16, 1 − ᾱ₁ would be 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deleatur.errors import SettingsError

HINT = "lower the number of steps in params.yaml, then: deleatur check"
TimestepSpacing = Literal["leading", "trailing", "linspace"]


@dataclass(frozen=True)
class NoiseSchedule:
    """The parts of a checkpoint's scheduler config that the sampler and the losses use.

    `output` is always the network's prediction as it is: ε, or v of a v-prediction checkpoint. Guidance and regression
    act on either alike, and only v has a value where ᾱ_t = 0 (zero terminal SNR).
    """

    alphas_cumprod: Tensor
    """(T,) ᾱ, fp32."""
    final_alpha_cumprod: float
    """ᾱ after the last step: ᾱ₀, or 1 where the checkpoint sets `set_alpha_to_one`."""
    steps_offset: int
    """Added to "leading" timesteps; 1 for Stable Diffusion 1.x."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    timestep_spacing: TimestepSpacing = "leading"
    """Where the sampler's timesteps are (Lin et al. 2023, table 2)."""

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    def timesteps(self, n: int) -> list[int]:
        """τ_0 … τ_{n−1} of the n-step sampler, for example 981, 961, …, 1 for n = 50, T = 1000 and offset 1.

        Raises SettingsError when the schedule does not have n of them.
        """
        total = self.num_timesteps
        if not 1 <= n <= total:
            raise SettingsError(f"expected 1 to {total} sampler steps, as the model has timesteps, got {n}", hint=HINT)
        taus: NDArray[np.float64]
        if self.timestep_spacing == "leading":
            taus = np.arange(n, dtype=float)[::-1] * (total // n) + self.steps_offset
        elif self.timestep_spacing == "trailing":
            taus = np.arange(total, 0, -total / n)[:n].round() - 1  # rounding errors can append an element
        else:
            taus = np.linspace(0, total - 1, n).round()[::-1]
        if taus[0] >= total:
            raise SettingsError(
                f"{n} sampler steps with steps_offset {self.steps_offset} would begin at timestep {taus[0]:g}: "
                f"expected fewer steps, so that all timesteps are below {total}",
                hint=HINT,
            )
        return [int(tau) for tau in taus]

    def add_noise(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z_t (B, …) of clean latents z₀ (B, …) at timesteps t (B,)."""
        a = self._alphas(z0, t)
        return a.sqrt() * z0 + (1 - a).sqrt() * eps

    def target(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The network's regression target at z_t: ε or v (B, …)."""
        if self.prediction_type == "epsilon":
            return eps
        a = self._alphas(z0, t)
        return a.sqrt() * eps - (1 - a).sqrt() * z0

    def predict_z0(self, z: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """z₀ (B, …) of noisy latents z (B, …), given the network's output."""
        a = self._alphas(z, t)
        if self.prediction_type == "v_prediction":
            return a.sqrt() * z - (1 - a).sqrt() * output
        return (z - (1 - a).sqrt() * output) / a.sqrt()

    def predict_epsilon(self, z: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """ε (B, …) of noisy latents z (B, …), given the network's output."""
        if self.prediction_type == "epsilon":
            return output
        a = self._alphas(z, t)
        return a.sqrt() * output + (1 - a).sqrt() * z

    def ddim_step(self, z: Tensor, output: Tensor, t: Tensor, n: int) -> Tensor:
        """One step of the n-step sampler from timesteps t (B,) to the next, for latents z (B, …).

        As in diffusers, the next timestep is T // n lower under every spacing.
        """
        t_next = t - self.num_timesteps // n
        a_next = self._alphas(z, t_next.clamp(min=0))
        finished = (t_next < 0).reshape(a_next.shape)
        a_next = torch.where(finished, a_next.new_tensor(self.final_alpha_cumprod), a_next)
        z0, eps = self.predict_z0(z, output, t), self.predict_epsilon(z, output, t)
        return a_next.sqrt() * z0 + (1 - a_next).sqrt() * eps

    def _alphas(self, z: Tensor, t: Tensor) -> Tensor:
        """ᾱ_t in fp32, shaped to broadcast with z (B, …)."""
        return self.alphas_cumprod.to(z.device)[t].reshape(-1, *[1] * (z.ndim - 1))

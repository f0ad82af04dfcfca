"""Terms of a fine-tuning loss: the student's inputs, its regression target and the error between the two.

θ: student, trained            θ*: teacher, its exponential moving average (EMA)         θ₀: the base model, frozen
c₀: the empty prompt           c_p: condition of the trajectories                        c_s: condition to be erased

L = Σ_i weight_i · mean error_i(ε_θ(z, t, c), sg[target])        error: by default the mean squared error
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.diffusion.predict import Weights, predict
from deleatur.training.trajectories import Restorable, Trajectories, TrajectoryReplay


@dataclass(frozen=True)
class Denoiser:
    """ε(z, t, c) of one set of weights."""

    model: Model
    weights: Weights

    def __call__(self, z: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return predict(self.model, self.weights, z, t, c)


@dataclass(frozen=True)
class Denoisers:
    """The three sets of weights of a training step."""

    student: Denoiser
    teacher: Denoiser
    base: Denoiser


@dataclass(frozen=True)
class Batch:
    """Inputs of the student, z (n, C, H, W), t (n,), c (n, L, d), and its regression target (n, C, H, W)."""

    z: Tensor
    t: Tensor
    c: Tensor
    target: Tensor


ErrorFunction = Callable[[Tensor, Tensor], Tensor]
"""(prediction (n, …), target (n, …)) → (b,), one error for each of b ≤ n states."""


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """(n,) of two (n, …)."""
    return (prediction - target).square().flatten(1).mean(1)


class LossTerm(Restorable, Protocol):
    """One term of the loss."""

    @property
    def weight(self) -> float: ...
    @property
    def generator(self) -> torch.Generator:
        """The source of all its random numbers."""
        ...

    def batch(self, denoisers: Denoisers, step: int) -> Batch:
        """The batch of iteration `step`. Called without gradient."""
        ...

    def error(self, prediction: Tensor, target: Tensor, /) -> Tensor: ...


TargetFunction = Callable[[Denoisers, Tensor, Tensor, Tensor], Tensor]
"""(denoisers, z, t, index) → the regression target at z under the rows `index` of c_s. Called without gradient."""


@dataclass
class TrajectoryTerm:
    """An erasing term: states of the sampler's trajectories, with the target of a method."""

    trajectories: Trajectories
    batch_size: int
    generator: torch.Generator
    timesteps: Tensor
    """(N,) τ, noise levels of the sampler."""
    from_base: bool
    """The base model makes the trajectories; otherwise the current teacher."""
    c_s: Tensor
    """(n, L, d)."""
    paired: bool
    """c_s has one row for each row of c_p, and a state trains under the condition that made it; otherwise the rows of
    c_s are cycled through."""
    extra_conditions: Tensor
    """(m, L, d): further conditions that the student predicts every state under; the target then has 1 + m parts."""
    target: TargetFunction
    error: ErrorFunction
    weight: float = 1.0

    def batch(self, denoisers: Denoisers, step: int) -> Batch:
        states = self.trajectories.next_batch((denoisers.base if self.from_base else denoisers.teacher).weights)
        b = len(states.k)
        t = self.timesteps[states.k.to(self.timesteps.device)]
        # A thinned pool may return fewer states than the batch size: the cycle still advances by full batches.
        index = states.condition if self.paired else (step * self.batch_size + torch.arange(b)) % len(self.c_s)
        index = index.to(self.c_s.device)
        target = self.target(denoisers, states.z, t, index)
        repeats = 1 + len(self.extra_conditions)
        c = torch.cat([self.c_s[index], self.extra_conditions.repeat_interleave(b, 0)])
        return Batch(torch.cat([states.z] * repeats), t.repeat(repeats), c, target)

    def tensors(self) -> dict[str, Tensor]:
        return self.trajectories.tensors()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.trajectories.restore(tensors)


@dataclass
class PreservationTerm:
    """Prior preservation: states of the base model's trajectories for prompts to preserve, with its own predictions."""

    trajectories: TrajectoryReplay
    timesteps: Tensor
    c: Tensor
    """(q, L, d)."""
    weight: float

    @property
    def generator(self) -> torch.Generator:
        return self.trajectories.sampler.generator

    def batch(self, denoisers: Denoisers, step: int) -> Batch:
        states, eps = self.trajectories.next_batch()
        t = self.timesteps[states.k.to(self.timesteps.device)]
        return Batch(states.z, t, self.c[states.condition.to(self.c.device)], eps)

    def error(self, prediction: Tensor, target: Tensor, /) -> Tensor:
        return mean_squared_error(prediction, target)

    def tensors(self) -> dict[str, Tensor]:
        return self.trajectories.tensors()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.trajectories.restore(tensors)

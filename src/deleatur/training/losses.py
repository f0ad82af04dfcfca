"""The terms of a fine-tuning loss: where states come from, what the student is asked there, what it should say.

θ: student, trained            θ*: teacher, its exponential moving average (EMA)         θ₀: the base model, frozen
c₀: the empty prompt           c_p: what trajectories are prompted with                  c_s: what is being removed

L = Σ_i weight_i · mean error_i(ε_θ(z, t, c), sg[goal])        error: as a rule, the mean square of the difference
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.diffusion.predict import Weights, predict
from deleatur.training.trajectories import Replay, Resumable, Trajectories


@dataclass(frozen=True)
class Network:
    """ε(z, t, c) of one weight set."""

    model: Model
    weights: Weights

    def __call__(self, z: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return predict(self.model, self.weights, z, t, c)


@dataclass(frozen=True)
class Networks:
    student: Network
    teacher: Network
    base: Network


@dataclass(frozen=True)
class Rows:
    """What the student is asked, z (n, C, H, W), t (n,), c (n, L, d), and what it should say, goal (n, C, H, W)."""

    z: Tensor
    t: Tensor
    c: Tensor
    goal: Tensor


Error = Callable[[Tensor, Tensor], Tensor]
"""(what the student said (n, …), goal (n, …)) → (b,), an error for each of b ≤ n states."""


def squared(said: Tensor, goal: Tensor) -> Tensor:
    return (said - goal).square().flatten(1).mean(1)


class Term(Resumable, Protocol):
    """One term of the loss."""

    @property
    def weight(self) -> float: ...
    @property
    def generator(self) -> torch.Generator:
        """Of all its draws."""
        ...

    def rows(self, networks: Networks, step: int) -> Rows:
        """Of iteration `step`. Called without gradient."""
        ...

    def error(self, said: Tensor, goal: Tensor, /) -> Tensor: ...


Target = Callable[[Networks, Tensor, Tensor, Tensor], Tensor]
"""(networks, z, t, which) → what the student should say at z under rows `which` of c_s. Called without gradient."""


@dataclass
class Prompted:
    """States of the sampler's trajectories, and what a method wants to be said there."""

    trajectories: Trajectories
    batch: int
    generator: torch.Generator
    taus: Tensor
    """(N,) τ."""
    base: bool
    """The trajectories are the base model's, not the teacher's of the moment."""
    c_s: Tensor
    """(n, L, d)."""
    paired: bool
    """c_s has a row for each row of c_p, and a state is trained under the condition that made it; otherwise the rows
    of c_s are taken in turn."""
    beside: Tensor
    """(m, L, d): what the student is asked about every state besides; the target then has 1 + m parts."""
    target: Target
    error: Error
    weight: float = 1.0

    def rows(self, networks: Networks, step: int) -> Rows:
        visit = self.trajectories.visit((networks.base if self.base else networks.teacher).weights)
        b = len(visit.k)
        t = self.taus[visit.k.to(self.taus.device)]
        which = visit.condition if self.paired else (step * self.batch + torch.arange(b)) % len(self.c_s)
        which = which.to(self.c_s.device)
        goal = self.target(networks, visit.z, t, which)
        asked = 1 + len(self.beside)
        c = torch.cat([self.c_s[which], self.beside.repeat_interleave(b, 0)])
        return Rows(torch.cat([visit.z] * asked), t.repeat(asked), c, goal)

    def tensors(self) -> dict[str, Tensor]:
        return self.trajectories.tensors()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.trajectories.restore(tensors)


@dataclass
class Preserved:
    """States of the base model's trajectories for prompts to preserve, and what it predicts there."""

    replay: Replay
    taus: Tensor
    c: Tensor
    """(q, L, d)."""
    weight: float

    @property
    def generator(self) -> torch.Generator:
        return self.replay.source.generator

    def rows(self, networks: Networks, step: int) -> Rows:
        visit, eps = self.replay.visit()
        t = self.taus[visit.k.to(self.taus.device)]
        return Rows(visit.z, t, self.c[visit.condition.to(self.c.device)], eps)

    def error(self, said: Tensor, goal: Tensor, /) -> Tensor:
        return squared(said, goal)

    def tensors(self) -> dict[str, Tensor]:
        return self.replay.tensors()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.replay.restore(tensors)

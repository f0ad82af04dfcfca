"""Where training states come from: trajectories of the guided sampler, fresh, from a staggered pool, or replayed.

N: sampler steps            k: steps already done, 0 … N−1       M: slots of the pool
b: states per iteration     τ_k: noise level of z⁽ᵏ⁾              S: stages trained on, the first ones (papers: S = N)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.diffusion.predict import Weights, guided_step, predict_pair
from deleatur.maths.guidance import cfg
from deleatur.training.cost import Work

Law = Literal["uniform", "beta33"]


@dataclass(frozen=True)
class Visit:
    """States to train on: z (b, C, H, W), stages k (b,), and which condition each was drawn under (b,)."""

    z: Tensor
    k: Tensor
    condition: Tensor


class Resumable(Protocol):
    """Draws nothing before its first visit: a run that goes on would only throw it away."""

    def tensors(self) -> dict[str, Tensor]: ...
    def restore(self, tensors: dict[str, Tensor]) -> None: ...


class Trajectories(Resumable, Protocol):
    def visit(self, weights: Weights) -> Visit: ...


def draw_stages(law: Law, n: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """k for fresh trajectories: uniform (SDD), or ⌊N·u⌋ with u ~ Beta(3, 3) (HFI's SDD, mid-trajectory)."""
    if law == "uniform":
        return torch.randint(n, shape, generator=generator)
    # The median of five uniforms is Beta(3, 3): no sampler that depends on a global generator.
    u = torch.rand(*shape, 5, generator=generator).median(-1).values
    return (n * u).long().clamp(max=n - 1)


def stage_weights(law: Law, n: int) -> Tensor:
    """q_k / max q (n,): the chance that a visited stage is trained on, so that the pool follows the law exactly."""
    if law == "uniform":
        return torch.ones(n)
    x = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    cdf = x**3 * (10 - 15 * x + 6 * x**2)  # of Beta(3, 3)
    q = cdf.diff()
    return (q / q.max()).float()


@dataclass
class Source:
    """What both kinds share: the network's guided step, the conditions, and the generator of all draws."""

    model: Model
    empty: Tensor
    conditions: Tensor
    """(n, L, d): what the trajectories are prompted with."""
    s_g: float
    steps: int
    generator: torch.Generator
    stages: int | None = None
    """S; none: all N. A trajectory goes no further than its last state that is trained on."""

    @property
    def used(self) -> int:
        return min(self.stages or self.steps, self.steps)

    def noise(self, n: int) -> Tensor:
        z = torch.randn(n, *self.model.latent_shape, generator=self.generator)
        return z.to(self.model.device, self.model.dtype)

    def advance(self, weights: Weights, z: Tensor, k: Tensor, condition: Tensor) -> Tensor:
        c_p = self.conditions[condition.to(self.conditions.device)]
        return guided_step(self.model, weights, z, k.to(z.device), self.empty, c_p, self.s_g, self.steps)


class Fresh:
    """Algorithm 1 of SDD: each state is the end of a trajectory of its own, made by the teacher of the moment."""

    def __init__(self, source: Source, *, batch: int, law: Law) -> None:
        self.source, self.batch, self.law = source, batch, law
        self.count = torch.zeros((), dtype=torch.long)

    def visit(self, weights: Weights) -> Visit:
        s = self.source
        k = draw_stages(self.law, s.used, (self.batch,), s.generator)
        condition = (self.count + torch.arange(self.batch)) % len(s.conditions)
        z = s.noise(self.batch)
        for j in range(int(k.max())):
            rows = (k > j).nonzero().squeeze(1)
            z[rows] = s.advance(weights, z[rows], torch.full_like(rows, j), condition[rows])
        self.count += self.batch
        return Visit(z, k, condition)

    @staticmethod
    def work(visits: int, used: int, batch: int) -> Work:
        """Under either law k is (S − 1)/2 on average, and a guided step takes two rows."""
        return Work(forward=visits * batch * (used - 1), wide=2 * batch, latents=batch)

    def tensors(self) -> dict[str, Tensor]:
        return {"count": self.count}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.count = tensors["count"]


class Pool:
    """M trajectories, evenly staggered; each visit trains on a state and moves it one step on, so every state counts.

    Slots are visited in a cyclic order shuffled once: the gap between two visits of a slot is constant, M/b.
    Expected gradient as with `Fresh`, up to the teacher's movement during a trajectory's life of S·M/b iterations.
    """

    def __init__(self, source: Source, *, batch: int, slots: int, law: Law) -> None:
        self.source, self.batch = source, batch
        self.accept = stage_weights(law, source.used)
        self.order = torch.randperm(slots, generator=source.generator)
        self.k = torch.arange(slots) * source.used // slots
        self.condition = torch.randperm(slots, generator=source.generator) % len(source.conditions)
        self.z = source.noise(slots)
        self.position = torch.zeros((), dtype=torch.long)
        self.started = torch.tensor(slots)

    def visit(self, weights: Weights) -> Visit:
        """The next b accepted states. Visited slots are moved on under `weights`, accepted or not."""
        s = self.source
        if self.position == 0:
            self._stagger(weights)
        visited: list[int] = []
        accepted: list[int] = []
        while len(accepted) < self.batch and len(visited) < len(self.order):
            slot = int(self.order[int(self.position) % len(self.order)])
            self.position += 1
            visited.append(slot)
            chance = self.accept[self.k[slot]]
            if chance == 1 or torch.rand((), generator=s.generator) < chance:
                accepted.append(slot)
        rows = torch.tensor(accepted or visited[: self.batch])
        out = Visit(self.z[rows].clone(), self.k[rows].clone(), self.condition[rows].clone())
        self._move_on(weights, torch.tensor(visited))
        return out

    def _stagger(self, weights: Weights) -> None:
        for j in range(int(self.k.max())):
            rows = (self.k > j).nonzero().squeeze(1)
            self.z[rows] = self.source.advance(weights, self.z[rows], torch.full_like(rows, j), self.condition[rows])

    def _move_on(self, weights: Weights, rows: Tensor) -> None:
        s = self.source
        ended = self.k[rows] == s.used - 1
        going, over = rows[~ended], rows[ended]
        if len(going):
            self.z[going] = s.advance(weights, self.z[going], self.k[going], self.condition[going])
            self.k[going] += 1
        if len(over):
            self.z[over] = s.noise(len(over))
            self.k[over] = 0
            self.condition[over] = (self.started + torch.arange(len(over))) % len(s.conditions)
            self.started += len(over)

    @staticmethod
    def work(visits: int, used: int, batch: int, slots: int, law: Law) -> Work:
        """Two rows for each step of the staggering, then for each visited state that is not its trajectory's last."""
        k = [i * used // slots for i in range(slots)]
        visited = min(batch / float(stage_weights(law, used).mean()), slots)
        forward = 2 * sum(k) + 2 * visits * visited * (used - 1) / used
        return Work(forward=forward, wide=2 * max(sum(i > 0 for i in k), batch), latents=slots)

    def tensors(self) -> dict[str, Tensor]:
        names = ("order", "k", "condition", "z", "position", "started")
        return {n: getattr(self, n) for n in names}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        _put_back(self, tensors)


class Replay:
    """M whole trajectories of weights that never change: their states in random order, once each, then M new ones.

    Such trajectories need not be made one step at a time, and what the weights predict at each state is known from
    making it: a training target for nothing.
    """

    def __init__(self, source: Source, weights: Weights, *, batch: int, slots: int) -> None:
        self.source, self.weights, self.batch, self.slots = source, weights, batch, slots
        self.turns = torch.randperm(len(source.conditions), generator=source.generator)
        self.started = self.position = torch.zeros((), dtype=torch.long)
        self.order = self.k = self.condition = torch.zeros(0, dtype=torch.long)
        self.z = self.eps = torch.zeros(0)

    def visit(self) -> tuple[Visit, Tensor]:
        """The next b states, and what the weights predict there under their condition (b, C, H, W)."""
        if int(self.position) + self.batch > len(self.order):
            self._make()
        rows = self.order[int(self.position) : int(self.position) + self.batch]
        self.position += self.batch
        return Visit(self.z[rows], self.k[rows], self.condition[rows]), self.eps[rows]

    def _make(self) -> None:
        s, schedule = self.source, self.source.model.schedule
        own = self.turns[(int(self.started) + torch.arange(self.slots)) % len(self.turns)]
        z, c_p = s.noise(self.slots), s.conditions[own.to(s.conditions.device)]
        states, predictions = [], []
        for tau in schedule.timesteps(s.steps):
            t = torch.full((self.slots,), tau, device=z.device)
            eps_0, eps_p = predict_pair(s.model, self.weights, z, t, s.empty, c_p)
            states.append(z)
            predictions.append(eps_p)
            z = schedule.ddim_step(z, cfg(eps_0, eps_p, s.s_g), t, s.steps)
        # Laid out as they will be when they come back from disk.
        self.z, self.eps = torch.cat(states).contiguous(), torch.cat(predictions).contiguous()
        self.k = torch.arange(s.steps).repeat_interleave(self.slots)
        self.condition = own.repeat(s.steps)
        self.order = torch.randperm(len(self.z), generator=s.generator)
        self.position = torch.zeros((), dtype=torch.long)
        self.started = self.started + self.slots

    @staticmethod
    def work(visits: int, steps: int, batch: int, slots: int) -> Work:
        made = -(-visits // (slots * steps // batch))
        return Work(forward=2 * made * slots * steps, wide=2 * slots, latents=2 * slots * steps)

    def tensors(self) -> dict[str, Tensor]:
        names = ("turns", "started", "z", "eps", "k", "condition", "order", "position")
        return {n: getattr(self, n) for n in names}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        _put_back(self, tensors)


def _put_back(states: Pool | Replay, tensors: dict[str, Tensor]) -> None:
    """States and predictions go to the network's device; what is counted and drawn stays on the CPU."""
    for name, value in tensors.items():
        setattr(states, name, value.to(states.source.model.device) if name in ("z", "eps") else value)


def trajectories(kind: Literal["fresh", "pool"], source: Source, *, batch: int, slots: int, law: Law) -> Fresh | Pool:
    return Fresh(source, batch=batch, law=law) if kind == "fresh" else Pool(source, batch=batch, slots=slots, law=law)

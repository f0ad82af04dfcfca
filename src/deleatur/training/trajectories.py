"""Training states: trajectories of the guided sampler, fresh, from a staggered pool, or replayed.

N: sampler steps            k: completed sampler steps, 0 … N−1       M: trajectories of the pool
b: states per iteration     τ_k: timestep of z⁽ᵏ⁾                     S: trained steps, the first ones (papers: S = N)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.diffusion.predict import Weights, guided_step, predict_pair
from deleatur.maths.guidance import cfg
from deleatur.training.cost import Workload

TimestepDistribution = Literal["uniform", "beta33"]


@dataclass(frozen=True)
class TrajectoryStates:
    """Noisy latents z (b, C, H, W), their completed steps k (b,), and the index of each one's condition (b,)."""

    z: Tensor
    k: Tensor
    condition: Tensor


class Restorable(Protocol):
    """A part of a run's checkpoint. Samples nothing before its first batch: restoring consumes no random numbers."""

    def tensors(self) -> dict[str, Tensor]: ...
    def restore(self, tensors: dict[str, Tensor]) -> None: ...


class Trajectories(Restorable, Protocol):
    def next_batch(self, weights: Weights) -> TrajectoryStates:
        """States of trajectories that these weights make."""
        ...


def sample_steps(
    distribution: TimestepDistribution, n: int, shape: tuple[int, ...], generator: torch.Generator
) -> Tensor:
    """k for fresh trajectories: uniform (SDD), or ⌊N·u⌋ with u ~ Beta(3, 3) (HFI's SDD, mid-trajectory)."""
    if distribution == "uniform":
        return torch.randint(n, shape, generator=generator)
    # The median of five uniforms is Beta(3, 3), and torch.distributions.Beta takes no generator.
    u = torch.rand(*shape, 5, generator=generator).median(-1).values
    return (n * u).long().clamp(max=n - 1)


def acceptance_probabilities(distribution: TimestepDistribution, n: int) -> Tensor:
    """q_k / max q (n,): rejection sampling that turns the pool's uniform k into the distribution q."""
    if distribution == "uniform":
        return torch.ones(n)
    x = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    cdf = x**3 * (10 - 15 * x + 6 * x**2)  # of Beta(3, 3)
    q = cdf.diff()
    return (q / q.max()).float()


@dataclass
class TrajectorySampler:
    """The guided sampler of all trajectories: its conditions, and the generator of all their random numbers."""

    model: Model
    c_0: Tensor
    conditions: Tensor
    """(n, L, d) c_p, what the trajectories are prompted with."""
    s_g: float
    sampler_steps: int
    generator: torch.Generator
    train_timesteps: int | None = None
    """S; none: all N. A trajectory ends at its last trained state."""

    @property
    def trained_steps(self) -> int:
        return self.train_timesteps or self.sampler_steps

    def noise(self, n: int) -> Tensor:
        # Drawn on the CPU: the same noise on every device.
        return torch.randn(n, *self.model.latent_shape, generator=self.generator).to(self.model.device)

    def advance(self, weights: Weights, z: Tensor, k: Tensor, condition: Tensor) -> Tensor:
        """z⁽ᵏ⁾ → z⁽ᵏ⁺¹⁾ for each row."""
        c_p = self.conditions[condition.to(self.conditions.device)]
        return guided_step(self.model, weights, z, k.to(z.device), self.c_0, c_p, self.s_g, self.sampler_steps)


class FreshTrajectories:
    """Algorithm 1 of SDD: each state ends a trajectory of its own, made by the current teacher."""

    def __init__(self, sampler: TrajectorySampler, *, batch_size: int, distribution: TimestepDistribution) -> None:
        self.sampler, self.batch_size, self.distribution = sampler, batch_size, distribution
        self.count = torch.zeros((), dtype=torch.long)

    def next_batch(self, weights: Weights) -> TrajectoryStates:
        s = self.sampler
        k = sample_steps(self.distribution, s.trained_steps, (self.batch_size,), s.generator)
        condition = (self.count + torch.arange(self.batch_size)) % len(s.conditions)
        z = s.noise(self.batch_size)
        for j in range(int(k.max())):
            rows = (k > j).nonzero().squeeze(1)  # those whose trajectory is longer
            z[rows] = s.advance(weights, z[rows], torch.full_like(rows, j), condition[rows])
        self.count += self.batch_size
        return TrajectoryStates(z, k, condition)

    @staticmethod
    def workload(batches: int, trained_steps: int, batch_size: int) -> Workload:
        """Under both distributions the mean of k is (S − 1)/2, and a guided step takes two rows."""
        return Workload(
            forward=batches * batch_size * (trained_steps - 1),
            max_forward_batch=2 * batch_size,
            stored_latents=batch_size,
        )

    def tensors(self) -> dict[str, Tensor]:
        return {"count": self.count}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.count = tensors["count"]


class TrajectoryPool:
    """M trajectories at evenly staggered steps. A visit trains on a state and advances it by one step.

    Every state of a trajectory is trained on, so one guided step per state replaces (S − 1)/2 of them.
    Trajectories are visited in a cyclic order shuffled once: two visits of the same one are always M/b batches apart.
    The expected gradient is that of `FreshTrajectories`, except that the teacher moves while a trajectory lives, which
    is for S·M/b iterations.
    """

    def __init__(
        self, sampler: TrajectorySampler, *, batch_size: int, pool_size: int, distribution: TimestepDistribution
    ) -> None:
        self.sampler, self.batch_size = sampler, batch_size
        self.acceptance = acceptance_probabilities(distribution, sampler.trained_steps)
        self.order = torch.randperm(pool_size, generator=sampler.generator)
        # Staggered from the start: a batch of equal steps would correlate successive gradients.
        self.k = torch.arange(pool_size) * sampler.trained_steps // pool_size
        self.condition = torch.randperm(pool_size, generator=sampler.generator) % len(sampler.conditions)
        self.z = sampler.noise(pool_size)
        self.position = torch.zeros((), dtype=torch.long)
        self.num_started = torch.tensor(pool_size)

    def next_batch(self, weights: Weights) -> TrajectoryStates:
        """The next b accepted states. Visited trajectories advance under `weights`, accepted or not."""
        if self.position == 0:
            self._stagger(weights)
        visited: list[int] = []
        accepted: list[int] = []
        # At most one round: a trajectory visited twice would be advanced twice from the same state.
        while len(accepted) < self.batch_size and len(visited) < len(self.order):
            slot = int(self.order[int(self.position) % len(self.order)])
            self.position += 1
            visited.append(slot)
            chance = self.acceptance[self.k[slot]]
            # A certain acceptance takes no random number, so `uniform` leaves the generator to the noise.
            if chance == 1 or torch.rand((), generator=self.sampler.generator) < chance:
                accepted.append(slot)
        rows = torch.tensor(accepted or visited[: self.batch_size])
        states = TrajectoryStates(self.z[rows].clone(), self.k[rows].clone(), self.condition[rows].clone())
        self._advance_or_restart(weights, torch.tensor(visited))
        return states

    def _stagger(self, weights: Weights) -> None:
        for j in range(int(self.k.max())):
            rows = (self.k > j).nonzero().squeeze(1)
            self.z[rows] = self.sampler.advance(weights, self.z[rows], torch.full_like(rows, j), self.condition[rows])

    def _advance_or_restart(self, weights: Weights, rows: Tensor) -> None:
        s = self.sampler
        at_end = self.k[rows] == s.trained_steps - 1
        running, finished = rows[~at_end], rows[at_end]
        if len(running):
            self.z[running] = s.advance(weights, self.z[running], self.k[running], self.condition[running])
            self.k[running] += 1
        if len(finished):
            self.z[finished] = s.noise(len(finished))
            self.k[finished] = 0
            # Conditions are cycled in the order of starts, whichever trajectory starts.
            self.condition[finished] = (self.num_started + torch.arange(len(finished))) % len(s.conditions)
            self.num_started += len(finished)

    @staticmethod
    def workload(
        batches: int, trained_steps: int, batch_size: int, pool_size: int, distribution: TimestepDistribution
    ) -> Workload:
        """Two rows for each step of the staggering, then for each visited state that is not its trajectory's last."""
        k = [i * trained_steps // pool_size for i in range(pool_size)]
        visited = min(batch_size / float(acceptance_probabilities(distribution, trained_steps).mean()), pool_size)
        return Workload(
            forward=2 * sum(k) + 2 * batches * visited * (trained_steps - 1) / trained_steps,
            max_forward_batch=2 * max(sum(i > 0 for i in k), batch_size),
            stored_latents=pool_size,
        )

    def tensors(self) -> dict[str, Tensor]:
        names = ("order", "k", "condition", "z", "position", "num_started")
        return {n: getattr(self, n) for n in names}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        _restore(self, tensors)


class TrajectoryReplay:
    """M complete trajectories of frozen weights: their states in random order, each once, then M new ones.

    Frozen weights allow making trajectories in advance, in large batches; and their predictions at each state, which
    are the regression targets, come from the sampler itself without a further call.
    """

    def __init__(self, sampler: TrajectorySampler, weights: Weights, *, batch_size: int, pool_size: int) -> None:
        self.sampler, self.weights, self.batch_size, self.pool_size = sampler, weights, batch_size, pool_size
        self.condition_order = torch.randperm(len(sampler.conditions), generator=sampler.generator)
        self.num_started = self.position = torch.zeros((), dtype=torch.long)
        self.order = self.k = self.condition = torch.zeros(0, dtype=torch.long)
        self.z = self.eps = torch.zeros(0)

    def next_batch(self) -> tuple[TrajectoryStates, Tensor]:
        """The next b states, and the weights' predictions there under their conditions (b, C, H, W)."""
        if int(self.position) + self.batch_size > len(self.order):
            self._sample_trajectories()
        rows = self.order[int(self.position) : int(self.position) + self.batch_size]
        self.position += self.batch_size
        return TrajectoryStates(self.z[rows], self.k[rows], self.condition[rows]), self.eps[rows]

    def _sample_trajectories(self) -> None:
        s, schedule = self.sampler, self.sampler.model.schedule
        condition = self.condition_order[
            (int(self.num_started) + torch.arange(self.pool_size)) % len(self.condition_order)
        ]
        z, c_p = s.noise(self.pool_size), s.conditions[condition.to(s.conditions.device)]
        states, predictions = [], []
        for tau in schedule.timesteps(s.sampler_steps):
            t = torch.full((self.pool_size,), tau, device=z.device)
            eps_0, eps_p = predict_pair(s.model, self.weights, z, t, s.c_0, c_p)
            states.append(z)
            predictions.append(eps_p)
            z = schedule.ddim_step(z, cfg(eps_0, eps_p, s.s_g), t, s.sampler_steps)
        # Contiguous, as a checkpoint restores them: another memory layout would round differently.
        self.z, self.eps = torch.cat(states).contiguous(), torch.cat(predictions).contiguous()
        self.k = torch.arange(s.sampler_steps).repeat_interleave(self.pool_size)
        self.condition = condition.repeat(s.sampler_steps)
        self.order = torch.randperm(len(self.z), generator=s.generator)
        self.position = torch.zeros((), dtype=torch.long)
        self.num_started = self.num_started + self.pool_size

    @staticmethod
    def workload(batches: int, sampler_steps: int, batch_size: int, pool_size: int) -> Workload:
        rounds = -(-batches // (pool_size * sampler_steps // batch_size))
        return Workload(
            forward=2 * rounds * pool_size * sampler_steps,
            max_forward_batch=2 * pool_size,
            stored_latents=2 * pool_size * sampler_steps,
        )

    def tensors(self) -> dict[str, Tensor]:
        names = ("condition_order", "num_started", "z", "eps", "k", "condition", "order", "position")
        return {n: getattr(self, n) for n in names}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        _restore(self, tensors)


def _restore(trajectories: TrajectoryPool | TrajectoryReplay, tensors: dict[str, Tensor]) -> None:
    """Latents and predictions go to the network's device; counters and indices stay on the CPU."""
    for name, value in tensors.items():
        on_device = name in ("z", "eps")
        setattr(trajectories, name, value.to(trajectories.sampler.model.device) if on_device else value)


def build_trajectories(
    kind: Literal["fresh", "pool"],
    sampler: TrajectorySampler,
    *,
    batch_size: int,
    pool_size: int,
    distribution: TimestepDistribution,
) -> FreshTrajectories | TrajectoryPool:
    if kind == "fresh":
        return FreshTrajectories(sampler, batch_size=batch_size, distribution=distribution)
    return TrajectoryPool(sampler, batch_size=batch_size, pool_size=pool_size, distribution=distribution)

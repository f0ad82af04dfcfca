"""Training states: timesteps, their distributions, and the equality of pooled and fresh trajectories."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deleatur.diffusion import predict as predict_module
from deleatur.diffusion.encode import encode_text
from deleatur.diffusion.model import Model
from deleatur.diffusion.predict import Weights, guided_step
from deleatur.training.parameters import select
from deleatur.training.trajectories import (
    FreshTrajectories,
    TrajectoryPool,
    TrajectoryReplay,
    TrajectorySampler,
    TrajectoryStates,
    acceptance_probabilities,
    build_trajectories,
    sample_steps,
)


def sampler(model: Model, steps: int, seed: int = 0, conditions: int = 2) -> TrajectorySampler:
    c = encode_text(model, ["gun", "sword", "cat"][:conditions])
    return TrajectorySampler(model, encode_text(model, [""]), c, 3.0, steps, torch.Generator().manual_seed(seed))


def guided_steps(model: Model, s: TrajectorySampler, z: Tensor, k: int, condition: int) -> Tensor:
    """k guided steps, written out."""
    for j in range(k):
        z = guided_step(model, {}, z, torch.tensor([j]), s.c_0, s.conditions[[condition]], s.s_g, s.sampler_steps)
    return z


def test_k_steps_cost_exactly_k_guided_calls(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = predict_module.predict

    def counting(m: Model, w: object, z: Tensor, t: Tensor, c: Tensor) -> Tensor:
        calls.append(len(z))
        return original(m, w, z, t, c)  # type: ignore[arg-type]

    monkeypatch.setattr(predict_module, "predict", counting)
    fresh = FreshTrajectories(sampler(model, 6), batch_size=1, distribution="uniform")
    for _ in range(12):
        calls.clear()
        states = fresh.next_batch({})
        assert calls == [2] * int(states.k)


@pytest.mark.parametrize("trained", [None, 3])
def test_a_fresh_state_is_the_end_of_its_own_trajectory(model: Model, trained: int | None) -> None:
    """Of the 5-step sampler, also where only its first steps are trained on."""
    s = replace(sampler(model, 5), train_timesteps=trained)
    states = FreshTrajectories(s, batch_size=4, distribution="uniform").next_batch({})
    assert states.k.max() > 0
    again = sampler(model, 5)
    sample_steps("uniform", trained or 5, (4,), again.generator)
    z = again.noise(4)
    for i, k in enumerate(states.k.tolist()):
        assert torch.allclose(
            states.z[i], guided_steps(model, s, z[i : i + 1], k, int(states.condition[i]))[0], atol=1e-4
        )


def test_every_state_of_the_pool_is_a_state_of_a_fresh_trajectory(model: Model) -> None:
    """With a frozen teacher a slot's states are those of one trajectory, from the slot's own noise."""
    s = sampler(model, 4)
    pool = TrajectoryPool(s, batch_size=2, pool_size=4, distribution="uniform")
    started = {slot: pool.z[slot].clone() for slot in (pool.k == 0).nonzero().flatten().tolist()}
    condition = pool.condition.clone()
    seen: dict[int, list[tuple[int, Tensor]]] = {slot: [] for slot in started}
    for _ in range(6):
        order = pool.order[(int(pool.position) + torch.arange(2)) % 4].tolist()
        states = pool.next_batch({})
        for row, slot in enumerate(order):
            if slot in seen and len(seen[slot]) < 4:
                seen[slot].append((int(states.k[row]), states.z[row]))
    for slot, states in seen.items():
        assert [k for k, _ in states] == list(range(len(states)))
        for k, z in states:
            expected = guided_steps(model, s, started[slot][None], k, int(condition[slot]))[0]
            assert torch.allclose(z, expected, atol=1e-4)


def teacher_at(model: Model, i: int) -> dict[str, Tensor]:
    """A teacher that changes with every batch."""
    return {n: w + 0.01 * (i + 1) for n, w in select(model.unet, "xattn_kv").items()}


@pytest.mark.parametrize(("steps", "batch", "slots"), [(4, 2, 6), (3, 3, 7), (2, 4, 4)])
def test_the_pool_is_to_the_bit_a_plain_loop_over_slots(model: Model, steps: int, batch: int, slots: int) -> None:
    """The staggered pool, written out: a list of slots, one after the other."""
    s, g = sampler(model, steps, seed=3, conditions=3), torch.Generator().manual_seed(3)
    pool = TrajectoryPool(s, batch_size=batch, pool_size=slots, distribution="uniform")

    def advance_slots(rows: list[dict[str, Any]], weights: dict[str, Tensor]) -> None:
        """One guided step of some slots, in one call: calls of other shapes round differently."""
        if not rows:
            return
        z, k = torch.stack([r["z"] for r in rows]), torch.tensor([r["k"] for r in rows])
        c_p = torch.stack([s.conditions[r["c"]] for r in rows])
        for row, z_next in zip(rows, guided_step(model, weights, z, k, s.c_0, c_p, 3.0, steps), strict=True):
            row["z"], row["k"] = z_next, row["k"] + 1

    order = torch.randperm(slots, generator=g).tolist()
    condition_order = torch.randperm(slots, generator=g).tolist()
    noise = torch.randn(slots, 4, 4, 4, generator=g)
    table = [{"z": noise[i], "k": 0, "c": condition_order[i] % 3} for i in range(slots)]
    starts = [i * steps // slots for i in range(slots)]  # spread evenly
    for _ in range(steps):
        advance_slots([r for r, start in zip(table, starts, strict=True) if r["k"] < start], teacher_at(model, 0))
    started, position, restarted = slots, 0, 0
    for i in range(3 * steps):
        current = [table[order[(position + j) % slots]] for j in range(batch)]
        position += batch
        states = pool.next_batch(teacher_at(model, i))
        assert torch.equal(states.z, torch.stack([r["z"] for r in current]))
        assert states.k.tolist() == [r["k"] for r in current]
        assert states.condition.tolist() == [r["c"] for r in current]
        finished = [r for r in current if r["k"] == steps - 1]
        advance_slots([r for r in current if r["k"] < steps - 1], teacher_at(model, i))
        for row, z in zip(finished, torch.randn(len(finished), 4, 4, 4, generator=g) if finished else (), strict=True):
            row.update(z=z, k=0, c=started % 3)  # after N steps a slot restarts, with the next condition
            started, restarted = started + 1, restarted + 1
    assert restarted >= slots, "every slot restarted"


def test_pool_timesteps_are_uniform(model: Model) -> None:
    pool = TrajectoryPool(sampler(model, 4), batch_size=2, pool_size=8, distribution="uniform")
    counts = Counter(k for _ in range(16) for k in pool.next_batch({}).k.tolist())
    assert set(counts) == {0, 1, 2, 3}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_conditions_are_cycled(model: Model) -> None:
    fresh = FreshTrajectories(sampler(model, 2, conditions=3), batch_size=2, distribution="uniform")
    counts = Counter(c for _ in range(9) for c in fresh.next_batch({}).condition.tolist())
    assert set(counts.values()) == {6}


def test_a_pool_of_one_step_trains_on_pure_noise(model: Model) -> None:
    pool = TrajectoryPool(sampler(model, 1), batch_size=4, pool_size=4, distribution="uniform")
    batches = [pool.next_batch({}) for _ in range(3)]
    assert all((v.k == 0).all() for v in batches)
    assert not torch.equal(batches[0].z, batches[1].z)


def test_a_restored_pool_continues_with_the_same_states(model: Model) -> None:
    one, other = (
        TrajectoryPool(sampler(model, 3, seed), batch_size=2, pool_size=4, distribution="uniform") for seed in (0, 1)
    )
    one.next_batch({})
    other.restore({n: t.clone() for n, t in one.tensors().items()})
    other.sampler.generator.set_state(one.sampler.generator.get_state())
    for _ in range(8):
        a, b = one.next_batch({}), other.next_batch({})
        assert torch.equal(a.z, b.z)
        assert torch.equal(a.k, b.k)


def next_batches(replay: TrajectoryReplay, n: int) -> list[tuple[TrajectoryStates, Tensor]]:
    return [replay.next_batch() for _ in range(n)]


def test_replayed_states_are_those_of_trajectories_each_used_once(model: Model) -> None:
    """6 trajectories of 3 steps, 2 states a states: 9 batches are all of them, the tenth starts new ones."""
    s = sampler(model, 3)
    replay = TrajectoryReplay(s, {}, batch_size=2, pool_size=6)
    batches = next_batches(replay, 9)
    first = replay.z.reshape(3, 6, *replay.z.shape[1:])
    k, condition = (torch.cat([getattr(v, part) for v, _ in batches]) for part in ("k", "condition"))
    assert Counter(k.tolist()) == {0: 6, 1: 6, 2: 6}
    assert Counter(condition.tolist()) == {0: 9, 1: 9}
    states = torch.cat([v.z for v, _ in batches])
    for slot in range(6):
        for step in range(3):
            z = guided_steps(model, s, first[0, slot : slot + 1], step, int(replay.condition[slot]))[0]
            assert torch.allclose(first[step, slot], z, atol=1e-4)
            assert (states == first[step, slot]).flatten(1).all(1).sum() == 1
    fresh, _ = replay.next_batch()
    assert not any((states == z).all() for z in fresh.z)


def test_replayed_conditions_are_cycled_in_a_shuffled_order_and_states_are_shuffled(model: Model) -> None:
    """Rounds of 2 trajectories over 3 conditions: 3 rounds start 2 of each."""
    s = sampler(model, 2, conditions=3)
    replay = TrajectoryReplay(s, {}, batch_size=4, pool_size=2)
    rounds = [states for states, _ in next_batches(replay, 3)]
    started = [
        c for states in rounds for c, k in zip(states.condition.tolist(), states.k.tolist(), strict=True) if k == 0
    ]
    assert Counter(started) == {0: 2, 1: 2, 2: 2}
    orders = [TrajectoryReplay(sampler(model, 2, seed, 3), {}, batch_size=4, pool_size=2) for seed in range(6)]
    assert len({tuple(o.condition_order.tolist()) for o in orders}) > 1
    ks = [tuple(o.next_batch()[0].k.tolist()) for o in orders]
    assert len(set(ks)) > 1


def test_replayed_predictions_are_the_networks(model: Model) -> None:
    s = sampler(model, 4)
    states, eps = TrajectoryReplay(s, {}, batch_size=5, pool_size=3).next_batch()
    t = torch.tensor(model.schedule.timesteps(4))[states.k]
    with torch.no_grad():
        expected = predict_module.predict(model, {}, states.z, t, s.conditions[states.condition])
    assert torch.allclose(eps, expected, atol=1e-5)


def test_beta33_has_its_moments() -> None:
    k = sample_steps("beta33", 50, (100_000,), torch.Generator().manual_seed(0)).double()
    assert k.mean() == pytest.approx(24.5, abs=0.1)
    assert k.std() == pytest.approx(9.45, abs=0.1)


def test_acceptance_probabilities_reproduce_beta33() -> None:
    """q_k / max q is the Beta(3, 3) probability of step k, up to a factor; half of the states are accepted."""
    from scipy import stats

    edges = torch.linspace(0, 1, 51, dtype=torch.float64).numpy()
    expected = torch.from_numpy(stats.beta(3, 3).cdf(edges)).diff()
    accept = acceptance_probabilities("beta33", 50)
    assert torch.allclose(accept.double() / accept.double().sum(), expected, atol=1e-7)
    assert accept.mean() == pytest.approx(0.53, abs=0.01)
    assert torch.equal(acceptance_probabilities("uniform", 7), torch.ones(7))


def test_a_pool_with_rejection_follows_beta33(model: Model) -> None:
    pool = TrajectoryPool(sampler(model, 5), batch_size=2, pool_size=16, distribution="beta33")
    k = torch.cat([pool.next_batch({}).k for _ in range(300)])
    share = torch.bincount(k, minlength=5).double() / len(k)
    accept = acceptance_probabilities("beta33", 5).double()
    assert torch.allclose(share, accept / accept.sum(), atol=0.05)


@pytest.mark.parametrize("kind", ["fresh", "pool"])
def test_trajectories_end_at_the_last_trained_step(model: Model, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The first S of N steps, uniformly, at the timesteps of the N-step sampler."""
    s = replace(sampler(model, 6), train_timesteps=3)
    advanced: list[int] = []
    original = TrajectorySampler.advance

    def recording_advance(self: TrajectorySampler, weights: Weights, z: Tensor, k: Tensor, condition: Tensor) -> Tensor:
        advanced.extend(k.tolist())
        return original(self, weights, z, k, condition)

    monkeypatch.setattr(TrajectorySampler, "advance", recording_advance)
    trajectories = build_trajectories(kind, s, batch_size=2, pool_size=6, distribution="uniform")  # type: ignore[arg-type]
    seen = Counter(k for _ in range(30) for k in trajectories.next_batch({}).k.tolist())
    assert set(seen) == {0, 1, 2}
    assert max(advanced) == 1, "no state after the last trained one is computed"
    if kind == "pool":
        assert set(seen.values()) == {20}

"""What the loop trains on, towards what, under which description; and that a run taken up again is the whole run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn import functional as F

from deleatur.diffusion import encode
from deleatur.diffusion.model import Model
from deleatur.diffusion.predict import predict
from deleatur.erasers.sdd import SDD
from deleatur.records.model import Delta
from deleatur.storage.tensors import load, save
from deleatur.training.loop import ErasureContext, Evaluation, TrainingProgress
from deleatur.training.parameters import select

NAMES = ("gun", "sword", "cat")
JOINED = "gun, sword, cat"
STEPS = 4


@dataclass(frozen=True)
class Call:
    """One call of the network: what went in, what came out, and whether it was for a gradient."""

    trains: bool
    z: Tensor
    t: Tensor
    c: Tensor
    out: Tensor


@contextmanager
def listening(model: Model) -> Iterator[list[Call]]:
    calls: list[Call] = []

    def hear(_network: object, given: tuple[Tensor, Tensor, Tensor], out: Any) -> None:
        z, t, c = (x.detach().clone() for x in given)
        calls.append(Call(torch.is_grad_enabled(), z, t, c, out.sample.detach()))

    handle = model.unet.register_forward_hook(hear)
    try:
        yield calls
    finally:
        handle.remove()


def iterations(calls: list[Call]) -> Iterator[tuple[list[Call], Call]]:
    """Calls without gradient since the last one with, and the one with."""
    before: list[Call] = []
    for call in calls:
        if call.trains:
            yield before, call
            before = []
        else:
            before.append(call)


def erase(model: Model, order: str = "single", names: tuple[str, ...] = NAMES, **numbers: Any) -> Delta:
    loop = {
        "iterations": 8,
        "batch_size": 2,
        "sampler_steps": STEPS,
        "lr": 1e-3,
        "ema_decay": 0.9,
        "pool_size": 8,
        **numbers,
    }
    concept = encode.concept_from_words(model, "weapon", names)
    return SDD(order=order, training=loop).erase(
        model, [concept], ErasureContext(1, encode.encode_text(model, ["a dog"]))
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("trajectories", ["fresh", "pool"])
def test_every_state_carries_the_level_that_diffusers_gives_it(model: Model, trajectories: str) -> None:
    """z⁽ᵏ⁾ at τ_k is where diffusers' DDIM step leads from a state that the teacher saw at τ_{k−1}."""
    with listening(model) as calls:
        erase(model, trajectories=trajectories, iterations=10)
    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    theirs.set_timesteps(STEPS)
    levels = theirs.timesteps.tolist()
    empty = encode.encode_text(model, [""])
    reached: list[list[Tensor]] = [[] for _ in levels]
    seen = set()
    for before, training in iterations(calls):
        for call in before:
            eps_0, eps_p = call.out.chunk(2)
            if torch.equal(call.c[-1:], empty):
                continue  # a target, or the drift
            for z, t, e_0, e_p in zip(call.z, call.t, eps_0, eps_p, strict=False):
                k = levels.index(int(t))
                if k + 1 < STEPS:
                    reached[k + 1].append(theirs.step(e_0 + 3.0 * (e_p - e_0), int(t), z).prev_sample)
        for z, t in zip(training.z, training.t.tolist(), strict=True):
            k = levels.index(t)
            seen.add(k)
            assert k == 0 or min(float((z - other).abs().max()) for other in reached[k]) < 1e-4
    assert seen == set(range(STEPS))


def test_the_target_carries_no_gradient(model: Model) -> None:
    """Adam's first moment after one step is a tenth of the gradient: compared with one worked out here."""
    moments: dict[str, Tensor] = {}

    def on_step(p: TrainingProgress) -> None:
        moments.update({n: p.state.optimizer.state[w]["exp_avg"].clone() for n, w in p.state.student.items()})

    numbers: dict[str, Any] = {
        "iterations": 1,
        "batch_size": 2,
        "sampler_steps": STEPS,
        "max_grad_norm": 1e6,
        "min_relative_change": 0.0,
    }
    with listening(model) as calls:
        sdd = SDD(order="single", training=numbers)  # type: ignore[arg-type]
        sdd.erase(model, [encode.concept_from_words(model, "weapon", ["gun"])], ErasureContext(1, on_step=on_step))
    [(_, training)] = iterations(calls)
    own = {n: p.detach().clone().requires_grad_() for n, p in select(model.unet, "xattn").items()}
    ours = predict(model, own, training.z, training.t, training.c)
    target = predict(model, own, training.z, training.t, encode.encode_text(model, [""]))
    stopped, flowing = (
        torch.autograd.grad(F.mse_loss(ours, goal), list(own.values()), retain_graph=True)
        for goal in (target.detach(), target)
    )
    assert all(torch.allclose(10 * moments[n], g, rtol=1e-3, atol=1e-7) for n, g in zip(own, stopped, strict=True))
    assert any(not torch.allclose(a, b, rtol=0.1, atol=1e-7) for a, b in zip(stopped, flowing, strict=True))


@pytest.mark.parametrize(("preserve", "still"), [(0.0, False), (1.0, True)])
def test_the_target_is_the_students_own_and_with_a_preserve_term_the_base_models(
    model: Model, preserve: float, still: bool
) -> None:
    with listening(model) as calls:
        erase(model, preserve=preserve, iterations=4)
    empty = encode.encode_text(model, [""])
    for before, _ in list(iterations(calls))[1:]:  # at first student and base are one
        [goal] = [call for call in before[-1:] if torch.equal(call.c, empty.expand_as(call.c))]
        with torch.no_grad():
            base = predict(model, {}, goal.z, goal.t, empty)
        assert torch.equal(goal.out, base) == still


TURNS = [("gun", "sword"), ("cat", "gun"), ("sword", "cat"), ("gun", "sword"), ("cat", "gun"), ("sword", "cat")]
"""Two rows an iteration, three descriptions, written down by hand."""
TOGETHER = [(JOINED, JOINED)] * 6


@pytest.mark.parametrize(
    ("order", "c_p", "c_s"), [("paper", TURNS, TOGETHER), ("code", TOGETHER, TURNS), ("single", TURNS, TURNS)]
)
def test_who_plays_which_role_in_turn(
    model: Model, order: str, c_p: list[tuple[str, str]], c_s: list[tuple[str, str]]
) -> None:
    """c_p is what the teacher is prompted with, c_s what the student is trained under."""
    texts = (*NAMES, JOINED)
    states = encode.encode_text(model, texts)

    def named(rows: Tensor) -> list[str]:
        return [
            text for row in rows for text, c in zip(texts, states, strict=True) if torch.allclose(row, c, atol=1e-5)
        ]

    with listening(model) as calls:
        erase(model, order, iterations=6)
    levels = model.schedule.timesteps(STEPS)
    prompted: set[str] = set()
    for (before, training), p, s in zip(iterations(calls), c_p, c_s, strict=True):
        assert tuple(named(training.c)) == s
        walking = [name for name, t in zip(p, training.t.tolist(), strict=True) if levels.index(t) > 0]
        teachers = [named(call.c) for call in before if named(call.c)]
        assert (teachers[0] if teachers else []) == walking
        prompted |= set(walking)
    assert prompted == {name for pair in c_p for name in pair}


READINGS = (
    Evaluation(1.0, 1.0),
    Evaluation(0.6, 0.97),
    Evaluation(0.5, 0.96),
    Evaluation(0.4, 0.5),
    Evaluation(0.0, 1.0),
)
"""Of the base and after every second step. The guard trips at the sixth, and the fourth was the best look."""


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("killed", "stop_at", "stop"),
    [
        (1, 0.0, "guard"),
        (4, 0.0, "guard"),
        (5, 0.0, "guard"),
        (6, 0.0, "guard"),
        (3, 0.5, "target"),
        (4, 0.5, "target"),
    ],
)
def test_a_run_taken_up_again_remembers_its_looks_and_its_best(
    model: Model, killed: int, stop_at: float, stop: str, tmp_path: Path
) -> None:
    concept = encode.concept_from_words(model, "weapon", ["gun"])
    numbers = {
        "iterations": 9,
        "batch_size": 2,
        "sampler_steps": STEPS,
        "lr": 1e-3,
        "ema_decay": 0.5,
        "eval_every": 2,
        "max_preserved_drop": 0.1,
    }
    sdd = SDD(order="single", training={**numbers, "target_rate": stop_at})  # type: ignore[arg-type]
    left = iter(READINGS)
    whole = sdd.erase(model, [concept], ErasureContext(1, probe=lambda w: next(left)))
    assert (whole.record["stop"], whole.record["steps"]) == (stop, {"guard": 6, "target": 4}[stop])

    def on_step(p: TrainingProgress) -> None:
        if p.step == killed:
            save(tmp_path / "state.safetensors", p.state.tensors(), p.state.metadata())
            raise Killed

    readings = iter(READINGS)
    with pytest.raises(Killed):
        sdd.erase(model, [concept], ErasureContext(1, probe=lambda w: next(readings), on_step=on_step))
    state = load(tmp_path / "state.safetensors")
    again = sdd.erase(model, [concept], ErasureContext(1, probe=lambda w: next(readings), state=state))
    assert all(torch.equal(whole.tensors[n], again.tensors[n]) for n in whole.tensors)
    assert again.record == whole.record
    assert list(readings) == list(left), "nothing was looked at twice"

"""The training loop: states, targets, roles of the conditions, early stopping, and resuming from a checkpoint."""

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
from deleatur.training.early_stopping import Evaluation
from deleatur.training.loop import ErasureContext, TrainingProgress, TrainingState
from deleatur.training.parameters import select

NAMES = ("gun", "sword", "cat")
JOINT_PROMPT = "gun, sword, cat"
STEPS = 4


@dataclass(frozen=True)
class Call:
    """Inputs and output of one call of the UNet, and whether it was made with gradient."""

    trains: bool
    z: Tensor
    t: Tensor
    c: Tensor
    out: Tensor


@contextmanager
def recorded_calls(model: Model) -> Iterator[list[Call]]:
    calls: list[Call] = []

    def record(_network: object, inputs: tuple[Tensor, Tensor, Tensor], out: Any) -> None:
        z, t, c = (x.detach().clone() for x in inputs)
        calls.append(Call(torch.is_grad_enabled(), z, t, c, out.sample.detach()))

    handle = model.unet.register_forward_hook(record)
    try:
        yield calls
    finally:
        handle.remove()


def iterations(calls: list[Call]) -> Iterator[tuple[list[Call], Call]]:
    """For each iteration, its calls without gradient and the one with."""
    before: list[Call] = []
    for call in calls:
        if call.trains:
            yield before, call
            before = []
        else:
            before.append(call)


def erase(model: Model, order: str = "single", names: tuple[str, ...] = NAMES, **config: Any) -> Delta:
    training = {
        "iterations": 8,
        "batch_size": 2,
        "sampler_steps": STEPS,
        "lr": 1e-3,
        "ema_decay": 0.9,
        "pool_size": 8,
        **config,
    }
    concept = encode.concept_from_words(model, "weapon", names)
    return SDD(order=order, training=training).erase(
        model, [concept], ErasureContext(1, encode.encode_text(model, ["a dog"]))
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("trajectories", ["fresh", "pool"])
def test_every_state_has_the_timestep_that_diffusers_gives_it(model: Model, trajectories: str) -> None:
    """z⁽ᵏ⁾ at τ_k is the result of diffusers' DDIM step from one of the teacher's states at τ_{k−1}."""
    with recorded_calls(model) as calls:
        erase(model, trajectories=trajectories, iterations=10)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(STEPS)
    timesteps = scheduler.timesteps.tolist()
    empty = encode.encode_text(model, [""])
    reached: list[list[Tensor]] = [[] for _ in timesteps]
    seen = set()
    for before, training in iterations(calls):
        for call in before:
            eps_0, eps_p = call.out.chunk(2)
            if torch.equal(call.c[-1:], empty):
                continue  # a target, or the drift measurement
            for z, t, e_0, e_p in zip(call.z, call.t, eps_0, eps_p, strict=False):
                k = timesteps.index(int(t))
                if k + 1 < STEPS:
                    reached[k + 1].append(scheduler.step(e_0 + 3.0 * (e_p - e_0), int(t), z).prev_sample)
        for z, t in zip(training.z, training.t.tolist(), strict=True):
            k = timesteps.index(t)
            seen.add(k)
            assert k == 0 or min(float((z - other).abs().max()) for other in reached[k]) < 1e-4
    assert seen == set(range(STEPS))


def test_the_target_carries_no_gradient(model: Model) -> None:
    """Adam's first moment after one step is a tenth of the gradient, which is computed here."""
    moments: dict[str, Tensor] = {}

    def on_step(p: TrainingProgress) -> None:
        moments.update({n: p.state.optimizer.state[w]["exp_avg"].clone() for n, w in p.state.student.items()})

    config: dict[str, Any] = {
        "iterations": 1,
        "batch_size": 2,
        "sampler_steps": STEPS,
        "max_grad_norm": 1e6,
        "min_relative_change": 0.0,
    }
    with recorded_calls(model) as calls:
        sdd = SDD(order="single", training=config)  # type: ignore[arg-type]
        sdd.erase(model, [encode.concept_from_words(model, "weapon", ["gun"])], ErasureContext(1, on_step=on_step))
    [(_, training)] = iterations(calls)
    student = {n: p.detach().clone().requires_grad_() for n, p in select(model.unet, "xattn").items()}
    prediction = predict(model, student, training.z, training.t, training.c)
    target = predict(model, student, training.z, training.t, encode.encode_text(model, [""]))
    detached, attached = (
        torch.autograd.grad(F.mse_loss(prediction, y), list(student.values()), retain_graph=True)
        for y in (target.detach(), target)
    )
    assert all(torch.allclose(10 * moments[n], g, rtol=1e-3, atol=1e-7) for n, g in zip(student, detached, strict=True))
    assert any(not torch.allclose(a, b, rtol=0.1, atol=1e-7) for a, b in zip(detached, attached, strict=True))


@pytest.mark.parametrize("max_grad_norm", [1e-4, 1e6])
def test_gradients_are_clipped_to_the_configured_norm(model: Model, max_grad_norm: float) -> None:
    """Adam's step does not depend on the scale, but its first moment is a tenth of the clipped gradient."""
    states: list[TrainingState] = []
    config = {"iterations": 1, "sampler_steps": STEPS, "max_grad_norm": max_grad_norm, "min_relative_change": 0.0}
    sdd = SDD(order="single", training=config)  # type: ignore[arg-type]
    context = ErasureContext(1, on_step=lambda p: states.append(p.state))  # type: ignore[arg-type]
    sdd.erase(model, [encode.concept_from_words(model, "weapon", ["gun"])], context)
    [state] = states
    moments = [state.optimizer.state[w]["exp_avg"] for w in state.student.values()]
    used = 10 * float(torch.stack([m.square().sum() for m in moments]).sum().sqrt())
    [row] = state.curve
    assert 1e-3 < row["grad_norm"] < 1e3, "the curve has the norm before clipping"
    assert used == pytest.approx(min(max_grad_norm, row["grad_norm"]), rel=1e-3)


@pytest.mark.parametrize(("preservation_weight", "is_base"), [(0.0, False), (1.0, True)])
def test_the_target_is_the_students_and_with_preservation_the_base_models(
    model: Model, preservation_weight: float, is_base: bool
) -> None:
    with recorded_calls(model) as calls:
        erase(model, preservation_weight=preservation_weight, iterations=4)
    empty = encode.encode_text(model, [""])
    for before, _ in list(iterations(calls))[1:]:  # the first student equals the base model
        [target] = [call for call in before[-1:] if torch.equal(call.c, empty.expand_as(call.c))]
        with torch.no_grad():
            base = predict(model, {}, target.z, target.t, empty)
        assert torch.equal(target.out, base) == is_base


CYCLED = [("gun", "sword"), ("cat", "gun"), ("sword", "cat"), ("gun", "sword"), ("cat", "gun"), ("sword", "cat")]
"""Two rows per iteration, three descriptions, written out by hand."""
JOINT = [(JOINT_PROMPT, JOINT_PROMPT)] * 6


@pytest.mark.parametrize(
    ("order", "c_p", "c_s"), [("paper", CYCLED, JOINT), ("code", JOINT, CYCLED), ("single", CYCLED, CYCLED)]
)
def test_roles_of_the_descriptions(
    model: Model, order: str, c_p: list[tuple[str, str]], c_s: list[tuple[str, str]]
) -> None:
    """c_p is the teacher's condition, c_s the student's."""
    texts = (*NAMES, JOINT_PROMPT)
    states = encode.encode_text(model, texts)

    def texts_of(rows: Tensor) -> list[str]:
        return [
            text for row in rows for text, c in zip(texts, states, strict=True) if torch.allclose(row, c, atol=1e-5)
        ]

    with recorded_calls(model) as calls:
        erase(model, order, iterations=6)
    timesteps = model.schedule.timesteps(STEPS)
    prompted: set[str] = set()
    for (before, training), p, s in zip(iterations(calls), c_p, c_s, strict=True):
        assert tuple(texts_of(training.c)) == s
        advanced = [name for name, t in zip(p, training.t.tolist(), strict=True) if timesteps.index(t) > 0]
        teachers = [texts_of(call.c) for call in before if texts_of(call.c)]
        assert (teachers[0] if teachers else []) == advanced
        prompted |= set(advanced)
    assert prompted == {name for pair in c_p for name in pair}


EVALUATIONS = (
    Evaluation(1.0, 1.0),
    Evaluation(0.6, 0.97),
    Evaluation(0.5, 0.96),
    Evaluation(0.4, 0.5),
    Evaluation(0.0, 1.0),
)
"""Of the base model and after every second step. At step 6 preserved prompts are degraded; step 4 is the best."""


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    ("interrupted", "target_rate", "stop"),
    [
        (1, 0.0, "guard"),
        (4, 0.0, "guard"),
        (5, 0.0, "guard"),
        (6, 0.0, "guard"),
        (3, 0.5, "target"),
        (4, 0.5, "target"),
    ],
)
def test_a_resumed_run_has_all_evaluations_and_the_best_weights(
    model: Model, interrupted: int, target_rate: float, stop: str, tmp_path: Path
) -> None:
    concept = encode.concept_from_words(model, "weapon", ["gun"])
    config = {
        "iterations": 9,
        "batch_size": 2,
        "sampler_steps": STEPS,
        "lr": 1e-3,
        "ema_decay": 0.5,
        "eval_every": 2,
        "max_preserved_drop": 0.1,
    }
    sdd = SDD(order="single", training={**config, "target_rate": target_rate})  # type: ignore[arg-type]
    remaining = iter(EVALUATIONS)
    complete = sdd.erase(model, [concept], ErasureContext(1, probe=lambda w: next(remaining)))
    assert (complete.record["stop"], complete.record["steps"]) == (stop, {"guard": 6, "target": 4}[stop])

    def on_step(p: TrainingProgress) -> None:
        if p.step == interrupted:
            save(tmp_path / "state.safetensors", p.state.tensors(), p.state.metadata())
            raise Interrupted

    evaluations = iter(EVALUATIONS)
    with pytest.raises(Interrupted):
        sdd.erase(model, [concept], ErasureContext(1, probe=lambda w: next(evaluations), on_step=on_step))
    state = load(tmp_path / "state.safetensors")
    resumed = sdd.erase(model, [concept], ErasureContext(1, probe=lambda w: next(evaluations), state=state))
    assert all(torch.equal(complete.tensors[n], resumed.tensors[n]) for n in complete.tensors)
    assert resumed.record == complete.record
    assert list(evaluations) == list(remaining), "no evaluation is repeated"

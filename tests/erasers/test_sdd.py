"""SDD's promises: the concept's prediction becomes the empty prompt's, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deleatur.diffusion import encode
from deleatur.diffusion.finetune import Progress, Reading, start
from deleatur.diffusion.load import Model, fingerprint
from deleatur.diffusion.overlay import weights_of
from deleatur.diffusion.predict import predict
from deleatur.erasers.keep import Keep
from deleatur.erasers.sdd import SDD
from deleatur.errors import ErasureRefused
from deleatur.io.tensors import load, save
from deleatur.records import Concept, Delta

QUICK = {"iterations": 60, "lr": 3e-3, "ema": 0.8, "steps": 4, "batch": 4}


def words(model: Model, *names: str) -> Concept:
    return encode.concept_from_words(model, "weapon", names)


def erase(model: Model, concept: Concept, order: str = "single", seed: int = 1, **numbers: Any) -> Delta:
    kept = encode.encode_text(model, ["", "a cat", "a dog"])
    return SDD(order=order, loop={**QUICK, **numbers}).erase(model, [concept], keep=kept, seed=seed)  # type: ignore[arg-type]


def gap(model: Model, weights: dict[str, Tensor], prompt: str, versus: str = "", base: bool = False) -> float:
    """Mean squared difference between predictions for two prompts, over noise levels."""
    g = torch.Generator().manual_seed(5)
    z, t = torch.randn(16, 4, 4, 4, generator=g), torch.linspace(50, 950, 16).long()
    with torch.no_grad():
        ours = predict(model, weights, z, t, encode.encode_text(model, [prompt]))
        other = predict(model, {} if base else weights, z, t, encode.encode_text(model, [versus]))
    return float((ours - other).square().mean())


@pytest.mark.parametrize("trajectories", ["fresh", "pool"])
def test_the_concept_is_predicted_as_the_empty_prompt(model: Model, trajectories: str) -> None:
    before = gap(model, {}, "gun")
    delta = erase(model, words(model, "gun"), trajectories=trajectories, slots=16)
    after = gap(model, weights_of(model, delta), "gun")
    assert before > 1e-5, "the effect exists before"
    assert after < 0.5 * before, "and mostly gone after"


def test_preserving_keeps_other_prompts_where_they_were(model: Model) -> None:
    off = weights_of(model, erase(model, words(model, "gun")))
    on = weights_of(model, erase(model, words(model, "gun"), preserve=4.0))
    moved_off, moved_on = (gap(model, w, "a cat", "a cat", base=True) for w in (off, on))
    assert moved_on < 0.5 * moved_off


def test_the_given_model_is_untouched_and_only_attn2_is_in_the_delta(model: Model) -> None:
    before = fingerprint(model.unet)
    delta = erase(model, words(model, "gun"), iterations=3)
    assert fingerprint(model.unet) == before
    assert all(p.grad is None and not p.requires_grad for p in model.unet.parameters())
    assert set(delta.tensors) == SDD().touches(model)
    assert all(".attn2." in n for n in delta.tensors)
    assert all(d.abs().sum() > 0 for n, d in delta.tensors.items() if n.endswith(("to_v.weight", "to_out.0.weight")))


def test_same_seed_same_bits_other_seed_other_bits(model: Model) -> None:
    one, same, other = (erase(model, words(model, "gun"), seed=s, iterations=4) for s in (1, 1, 2))
    assert all(torch.equal(one.tensors[n], same.tensors[n]) for n in one.tensors)
    assert any(not torch.equal(one.tensors[n], other.tensors[n]) for n in one.tensors)


def test_nothing_to_erase_is_no_loss_and_is_refused(model: Model) -> None:
    """c_s = c₀: the loss is 0 from the first step, so the weights do not move."""
    empty = encode.encode_text(model, [""])
    nothing = Concept("nothing", "words", ("",), (("",),), empty, ((),), (1,))
    losses: list[float] = []
    sdd = SDD(order="single", loop={**QUICK, "iterations": 3, "weight_decay": 0.0})
    with pytest.raises(ErasureRefused, match="nothing was erased"):
        sdd.erase(model, [nothing], keep=None, seed=0, on_step=lambda p: losses.append(p.loss))
    assert losses == [0.0, 0.0, 0.0]


def test_the_teacher_is_the_average_of_the_student(model: Model) -> None:
    """θ*_n = m θ*_{n−1} + (1−m) θ_n from the very first step, and it is what comes back."""
    students: list[dict[str, Tensor]] = []

    def on_step(p: Progress) -> None:
        students.append({n: w.detach().clone() for n, w in p.state.student.items()})

    numbers = {**QUICK, "iterations": 5, "ema": 0.7}
    sdd = SDD(order="single", loop=numbers)  # type: ignore[arg-type]
    delta = sdd.erase(model, [words(model, "gun")], keep=None, seed=0, on_step=on_step)
    for name, difference in delta.tensors.items():
        own = model.unet.get_parameter(name)
        average = own.clone()
        for student in students:
            average = 0.7 * average + 0.3 * student[name]
        assert torch.allclose(own + difference, average, atol=1e-6)


def test_roles_of_several_descriptions(model: Model) -> None:
    both = words(model, "gun", "sword")
    each, joined = both.states, encode.joined(model, [both])
    for order, c_p, c_s in (("paper", each, joined), ("code", joined, each), ("single", each, each)):
        got = SDD(order=order).roles(model, [both])  # type: ignore[arg-type]
        assert torch.equal(got[0], c_p)
        assert torch.equal(got[1], c_s)


@pytest.mark.parametrize("order", ["paper", "code"])
def test_every_order_of_roles_runs(model: Model, order: str) -> None:
    assert erase(model, words(model, "gun", "sword"), order=order, iterations=3).record["steps"] == 3


def test_stops_at_the_target_and_at_the_guard(model: Model) -> None:
    readings = iter([Reading(1.0, 1.0), Reading(0.5, 0.97), Reading(0.1, 0.96), Reading(0.0, 0.95)])
    sdd = SDD(order="single", loop={**QUICK, "iterations": 40, "check_every": 2, "stop_at": 0.2, "guard": 0.1})
    reached = sdd.erase(model, [words(model, "gun")], keep=None, seed=0, probe=lambda w: next(readings))
    assert (reached.record["stop"], reached.record["steps"]) == ("target", 4)
    readings = iter([Reading(1.0, 1.0), Reading(0.6, 0.95), Reading(0.3, 0.5)])
    guarded = sdd.erase(model, [words(model, "gun")], keep=None, seed=0, probe=lambda w: next(readings))
    assert (guarded.record["stop"], guarded.record["steps"]) == ("guard", 4)
    two = SDD(order="single", loop={**QUICK, "iterations": 2}).erase(model, [words(model, "gun")], keep=None, seed=0)
    assert all(torch.equal(guarded.tensors[n], two.tensors[n]) for n in two.tensors), "the look before the damage"


def test_a_run_that_destroys_the_model_at_once_is_refused(model: Model) -> None:
    readings = iter([Reading(1.0, 1.0), Reading(0.9, 0.2)])
    sdd = SDD(order="single", loop={**QUICK, "check_every": 2, "guard": 0.1})
    with pytest.raises(ErasureRefused, match="preserved prompts fell"):
        sdd.erase(model, [words(model, "gun")], keep=None, seed=0, probe=lambda w: next(readings))


@pytest.mark.parametrize("trajectories", ["fresh", "pool"])
@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_saved_run_goes_on_with_the_same_bits(model: Model, trajectories: str, stop_at: int, tmp_path: Path) -> None:
    concept, kept = words(model, "gun", "sword"), encode.encode_text(model, ["", "a cat"])
    numbers = {**QUICK, "iterations": 6, "preserve": 1.0, "trajectories": trajectories, "slots": 6, "law": "beta33"}
    sdd = SDD(order="single", loop=numbers)  # type: ignore[arg-type]
    whole = sdd.erase(model, [concept], keep=kept, seed=3)
    path = tmp_path / "state.safetensors"

    class Killed(Exception):
        pass

    def on_step(p: Progress) -> None:
        if p.step == stop_at:
            save(path, p.state.tensors(), p.state.numbers())
            raise Killed

    with pytest.raises(Killed):
        sdd.erase(model, [concept], keep=kept, seed=3, on_step=on_step)
    state = start(model, sdd.loop, concept.states, encode.encode_text(model, [""]), kept, 999)
    state.restore(*load(path))
    again = sdd.erase(model, [concept], keep=kept, seed=3, state=state)
    assert all(torch.equal(whole.tensors[n], again.tensors[n]) for n in whole.tensors)
    assert whole.record["curve"] == again.record["curve"]


def test_trainable_parameters_of_stable_diffusion_are_the_published_number() -> None:
    from diffusers import UNet2DConditionModel

    from deleatur.diffusion.select import select

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    counts = {rule: sum(p.numel() for p in select(unet, rule).values()) for rule in ("xattn", "xattn_kv", "full")}  # type: ignore[arg-type]
    assert counts == {"xattn": 43_962_560, "xattn_kv": 19_169_280, "full": 859_520_964}


def test_keep_is_the_untouched_model(model: Model) -> None:
    delta = Keep().erase(model, [words(model, "gun")], keep=None, seed=0)
    assert delta.tensors == {}
    assert weights_of(model, delta) == {}

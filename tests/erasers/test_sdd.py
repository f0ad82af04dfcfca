"""SDD's promises: the concept's prediction becomes the empty prompt's, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from deleatur.diffusion import encode
from deleatur.diffusion.model import Model, digest_module
from deleatur.diffusion.overlay import edited_weights
from deleatur.diffusion.predict import predict
from deleatur.erasers.keep import Keep
from deleatur.erasers.sdd import SDD
from deleatur.errors import ErasureRefused
from deleatur.records.model import Concept, Delta, SoftToken
from deleatur.storage.tensors import load, save
from deleatur.training.config import TrajectoryTrainingConfig
from deleatur.training.loop import ErasureContext, Evaluation, TrainingProgress
from deleatur.training.optimizer_state import SavedState

QUICK = {"iterations": 60, "lr": 3e-3, "ema_decay": 0.8, "sampler_steps": 4, "batch_size": 4}


def words(model: Model, *names: str) -> Concept:
    return encode.concept_from_words(model, "weapon", names)


def erase(model: Model, concept: Concept, order: str = "single", seed: int = 1, **numbers: Any) -> Delta:
    kept = encode.encode_text(model, ["", "a cat", "a dog"])
    return SDD(order=order, training={**QUICK, **numbers}).erase(model, [concept], ErasureContext(seed, kept))  # type: ignore[arg-type]


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
    after = gap(model, edited_weights(model, delta), "gun")
    assert before > 1e-5, "the effect exists before"
    assert after < 0.5 * before, "and mostly gone after"


def test_parity_is_the_published_method_and_refuses_what_is_ours() -> None:
    loop = TrajectoryTrainingConfig(preset="parity")
    assert (
        loop.trajectories,
        loop.batch_size,
        loop.sampler_steps,
        loop.iterations,
        loop.lr,
        loop.ema_decay,
        loop.guidance_scale,
    ) == (
        "fresh",
        1,
        50,
        1500,
        1e-5,
        0.999,
        3.0,
    )
    assert not loop.notes(), "nothing is ours, nothing is to be said"
    assert TrajectoryTrainingConfig(preset="parity", lr=1e-4, sampler_steps=8).sampler_steps == 8, (
        "lengths and rates fit the model"
    )
    refused: list[dict[str, Any]] = [
        {"preservation_weight": 0.1},
        {"trajectories": "pool"},
        {"batch_size": 4},
        {"train_timesteps": 2},
        {"trajectory_model": "base"},
        {"timestep_distribution": "uniform"},
        {"eval_every": 100},
    ]
    for ours in refused:
        with pytest.raises(ValidationError, match=f"parity is the method as published, without {next(iter(ours))};"):
            TrajectoryTrainingConfig(preset="parity", **ours)


@pytest.mark.parametrize(("source", "law"), [("words", "uniform"), ("token", "beta33")])
def test_stages_are_drawn_by_the_law_of_the_paper_the_concept_comes_from(model: Model, source: str, law: str) -> None:
    vectors = encode.word_embedding(model, "gun")[None, None]
    concept = words(model, "gun") if source == "words" else encode.concept_from_token(model, SoftToken("gun", vectors))
    left, named = (erase(model, concept, iterations=4, **numbers) for numbers in ({}, {"timestep_distribution": law}))
    other = erase(model, concept, iterations=4, law="beta33" if law == "uniform" else "uniform")
    same = [all(torch.equal(left.tensors[n], d.tensors[n]) for n in left.tensors) for d in (named, other)]
    assert same == [True, False]


def test_preserving_keeps_other_prompts_where_they_were(model: Model) -> None:
    off = edited_weights(model, erase(model, words(model, "gun")))
    on = edited_weights(model, erase(model, words(model, "gun"), preserve=4.0))
    moved_off, moved_on = (gap(model, w, "a cat", "a cat", base=True) for w in (off, on))
    assert moved_on < 0.5 * moved_off


def test_the_given_model_is_untouched_and_only_attn2_is_in_the_delta(model: Model) -> None:
    before = digest_module(model.unet)
    delta = erase(model, words(model, "gun"), iterations=3)
    assert digest_module(model.unet) == before
    assert all(p.grad is None and not p.requires_grad for p in model.unet.parameters())
    assert set(delta.tensors) == SDD().touched_parameters(model)
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
    sdd = SDD(order="single", training={**QUICK, "iterations": 3, "weight_decay": 0.0})
    with pytest.raises(ErasureRefused, match="nothing was erased"):
        sdd.erase(model, [nothing], ErasureContext(0, on_step=lambda p: losses.append(p.loss)))
    assert losses == [0.0, 0.0, 0.0]


def test_the_teacher_is_the_average_of_the_student(model: Model) -> None:
    """θ*_n = m θ*_{n−1} + (1−m) θ_n from the very first step, and it is what comes back."""
    students: list[dict[str, Tensor]] = []

    def on_step(p: TrainingProgress) -> None:
        students.append({n: w.detach().clone() for n, w in p.state.student.items()})

    numbers = {**QUICK, "iterations": 5, "ema_decay": 0.7}
    sdd = SDD(order="single", training=numbers)  # type: ignore[arg-type]
    delta = sdd.erase(model, [words(model, "gun")], ErasureContext(0, on_step=on_step))
    for name, difference in delta.tensors.items():
        own = model.unet.get_parameter(name)
        average = own.clone()
        for student in students:
            average = 0.7 * average + 0.3 * student[name]
        assert torch.allclose(own + difference, average, atol=1e-6)


def test_roles_of_several_descriptions(model: Model) -> None:
    both = words(model, "gun", "sword")
    each, joined = both.states, encode.encode_joint_prompt(model, [both])
    for order, c_p, c_s in (("paper", each, joined), ("code", joined, each), ("single", each, each)):
        got = SDD(order=order).condition_roles(model, [both])  # type: ignore[arg-type]
        assert torch.equal(got[0], c_p)
        assert torch.equal(got[1], c_s)


@pytest.mark.parametrize("order", ["paper", "code"])
def test_every_order_of_roles_runs(model: Model, order: str) -> None:
    assert erase(model, words(model, "gun", "sword"), order=order, iterations=3).record["steps"] == 3


def looked(model: Model, *readings: Evaluation, told: list[TrainingProgress] | None = None, **numbers: Any) -> Delta:
    """A run whose looks, the one before its first step included, say what is given."""
    says = iter(readings)
    loop = {**QUICK, "iterations": 40, "eval_every": 2, "max_preserved_drop": 0.1, **numbers}
    return SDD(order="single", training=loop).erase(  # type: ignore[arg-type]
        model,
        [words(model, "gun")],
        ErasureContext(0, probe=lambda w: next(says), on_step=lambda p: told.append(p) if told is not None else None),
    )


def same(one: Delta, other: Delta) -> bool:
    return all(torch.equal(one.tensors[n], other.tensors[n]) for n in other.tensors)


def test_stops_at_the_target(model: Model) -> None:
    told: list[TrainingProgress] = []
    reached = looked(
        model,
        Evaluation(1.0, 1.0),
        Evaluation(0.5, 0.97),
        Evaluation(0.1, 0.96),
        Evaluation(0.0, 0.95),
        told=told,
        stop_at=0.2,
    )
    assert (reached.record["stop"], reached.record["steps"]) == ("target", 4)
    assert [(p.step, p.total) for p in told] == [(1, 40), (2, 40), (3, 40), (4, 4)], "there is no more to wait for"
    assert same(reached, erase(model, words(model, "gun"), seed=0, iterations=4))


@pytest.mark.parametrize(
    ("readings", "best"),
    [
        ([(0.6, 0.95), (0.3, 0.5)], 2),
        ([(0.2, 0.95), (0.4, 0.95), (0.3, 0.5)], 2),  # fewest of the concept's pictures, not newest
        ([(0.4, 0.95), (0.2, 0.95), (0.3, 0.5)], 4),
        ([(0.2, 0.92), (0.2, 0.95), (0.1, 0.5)], 4),  # of two alike, the one that keeps more
        ([(0.2, 0.95), (0.1, 0.95, 0.2)], 2),  # what is kept is recognised still, but blank or noise
    ],
)
def test_at_the_guard_the_best_look_before_it_comes_back(
    model: Model, readings: list[tuple[float, ...]], best: int
) -> None:
    guarded = looked(model, Evaluation(1.0, 1.0), *(Evaluation(*r) for r in readings))
    assert (guarded.record["stop"], guarded.record["steps"]) == ("guard", 2 * len(readings))
    assert same(guarded, erase(model, words(model, "gun"), seed=0, iterations=best))


def test_the_last_step_is_looked_at_too(model: Model) -> None:
    readings = [Evaluation(1.0, 1.0), Evaluation(0.5, 0.95), Evaluation(0.4, 0.95)]
    well = looked(model, *readings, Evaluation(0.3, 0.95), iterations=5)
    assert [look["step"] for look in well.record["looks"]] == [0, 2, 4, 5]
    assert well.record["stop"] == "end"
    spoiled = looked(model, *readings, Evaluation(0.0, 0.1), iterations=5)
    assert (spoiled.record["stop"], spoiled.record["steps"]) == ("guard", 5)
    assert same(spoiled, erase(model, words(model, "gun"), seed=0, iterations=4))


def test_a_run_that_destroys_the_model_at_once_is_refused(model: Model) -> None:
    with pytest.raises(ErasureRefused, match=r"kept from 1.000 to 0.200$"):
        looked(model, Evaluation(1.0, 1.0), Evaluation(0.9, 0.2))
    with pytest.raises(ErasureRefused, match=r"contrast from 30.000 to 2.000$"):
        looked(model, Evaluation(1.0, 1.0, 30.0), Evaluation(0.9, 1.0, 2.0))


@pytest.mark.parametrize(
    ("lr", "iterations", "said"), [(5.0, 1, "times their norm"), (1e30, 1, "by inf times"), (1e30, 3, "became")]
)
def test_without_a_look_too_a_run_that_destroys_the_model_is_refused(
    model: Model, lr: float, iterations: int, said: str
) -> None:
    with pytest.raises(ErasureRefused, match=said):
        erase(model, words(model, "gun"), lr=lr, iterations=iterations)


@pytest.mark.parametrize("trajectories", ["fresh", "pool"])
def test_a_run_saved_after_any_step_goes_on_with_the_same_bits(model: Model, trajectories: str, tmp_path: Path) -> None:
    """Convolutions included, whose tensors are laid out in memory as no file lays them out; and the best look."""
    concept, kept = words(model, "gun", "sword"), encode.encode_text(model, ["", "a cat"])
    numbers = {
        **QUICK,
        "iterations": 6,
        "preservation_weight": 1.0,
        "trajectories": trajectories,
        "pool_size": 6,
        "timestep_distribution": "beta33",
    }
    numbers |= {"trainable": "full", "eval_every": 2, "max_preserved_drop": 0.1}
    sdd = SDD(order="single", training=numbers)  # type: ignore[arg-type]
    readings = {0: Evaluation(1.0, 1.0), 2: Evaluation(0.2, 0.95), 4: Evaluation(0.3, 0.95), 6: Evaluation(0.1, 0.5)}

    def run(state: SavedState | None = None) -> tuple[Delta, list[int]]:
        told = [-1] if state is None else []

        def on_step(p: TrainingProgress) -> None:
            told.append(p.step)
            if state is None:
                save(tmp_path / str(p.step), p.state.tensors(), p.state.metadata())

        delta = sdd.erase(
            model,
            [concept],
            ErasureContext(3, kept, on_step=on_step, state=state, probe=lambda w: readings[told[-1] + 1]),
        )
        return delta, told

    whole, _ = run()
    assert whole.record["stop"] == "guard"
    for step in range(1, 7):
        again, told = run(load(tmp_path / str(step)))
        assert told == list(range(step, 7)), "it goes on where it was"
        assert all(torch.equal(whole.tensors[n], again.tensors[n]) for n in whole.tensors)
        assert whole.record == again.record


def test_trainable_parameters_of_stable_diffusion_are_the_published_number() -> None:
    from diffusers import UNet2DConditionModel

    from deleatur.training.parameters import select

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    counts = {rule: sum(p.numel() for p in select(unet, rule).values()) for rule in ("xattn", "xattn_kv", "full")}  # type: ignore[arg-type]
    assert counts == {"xattn": 43_962_560, "xattn_kv": 19_169_280, "full": 859_520_964}


def test_keep_is_the_untouched_model(model: Model) -> None:
    delta = Keep().erase(model, [words(model, "gun")], ErasureContext(0))
    assert delta.tensors == {}
    assert edited_weights(model, delta) == {}

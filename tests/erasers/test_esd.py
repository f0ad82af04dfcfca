"""ESD: the concept's prediction moves away from the concept, and only the selected tensors train."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from deleatur.diffusion import encode
from deleatur.diffusion.model import Model
from deleatur.diffusion.overlay import edited_weights
from deleatur.diffusion.predict import predict
from deleatur.erasers.esd import ESD, ESDTraining, negative_guidance_target
from deleatur.erasers.sdd import unconditional_target
from deleatur.errors import ErasureRefused
from deleatur.maths.seeds import generator
from deleatur.records.model import Concept
from deleatur.training.loop import ErasureContext
from deleatur.training.losses import Denoiser, Denoisers
from deleatur.training.parameters import select

QUICK: dict[str, Any] = {
    "iterations": 40,
    "lr": 4e-3,
    "sampler_steps": 4,
    "batch_size": 4,
    "trajectories": "pool",
    "pool_size": 16,
}


def words(model: Model, *names: str) -> Concept:
    return encode.concept_from_words(model, "weapon", names)


@pytest.fixture
def denoisers(model: Model) -> Denoisers:
    """A student and a teacher that differ from the base model."""
    g = torch.Generator().manual_seed(1)
    parameters = select(model.unet, "xattn")
    moved = [{n: p + 0.1 * torch.randn(p.shape, generator=g) for n, p in parameters.items()} for _ in range(2)]
    return Denoisers(Denoiser(model, moved[0]), Denoiser(model, moved[1]), Denoiser(model, {}))


@pytest.fixture
def states() -> tuple[Tensor, Tensor, Tensor]:
    """z, t, and the index of each one's description."""
    g = torch.Generator().manual_seed(2)
    return torch.randn(3, 4, 4, 4, generator=g), torch.tensor([50, 400, 900]), torch.tensor([1, 0, 1])


def test_both_targets_follow_the_papers_formula(
    model: Model, denoisers: Denoisers, states: tuple[Tensor, Tensor, Tensor]
) -> None:
    z, t, rows = states
    c, c_0 = words(model, "gun", "sword").states, encode.encode_text(model, [""])
    with torch.no_grad():
        of_c, of_0 = denoisers.base(z, t, c[[1, 0, 1]]), denoisers.base(z, t, c_0)
    for start, c_from in (("empty", of_0), ("concept", of_c)):
        esd = ESD(eta=3.0, start=start)  # type: ignore[arg-type]
        assert torch.allclose(
            negative_guidance_target(c, c_0, esd.guidance)(denoisers, z, t, rows),
            c_from - 3 * (of_c - of_0),
            atol=1e-5,
        )


def test_eta_2_from_the_concept_is_eta_1_from_the_empty_prompt() -> None:
    """c − 2 (c − c₀) = c₀ − 1 (c − c₀)."""
    assert ESD(eta=2.0, start="concept").guidance == ESD(eta=1.0).guidance


def test_with_eta_0_the_target_is_sdds_frozen_one(
    model: Model, denoisers: Denoisers, states: tuple[Tensor, Tensor, Tensor]
) -> None:
    c, c_0 = words(model, "gun", "sword").states, encode.encode_text(model, [""])
    esd, sdd = negative_guidance_target(c, c_0, ESD(eta=0.0).guidance), unconditional_target(c_0, frozen=True)
    assert torch.allclose(esd(denoisers, *states), sdd(denoisers, *states), atol=1e-6)


def test_x_and_u_train_the_tensors_of_the_paper(model: Model) -> None:
    all_names = {n for n, _ in model.unet.named_parameters()}
    x, strict, u = (ESD(training={"trainable": t}).touched_parameters(model) for t in ("xattn", "xattn_kv", "noxattn"))  # type: ignore[arg-type]
    assert x == {n for n in all_names if ".attn2." in n}
    assert strict == {n for n in x if n.split(".attn2.")[1] in ("to_k.weight", "to_v.weight")}
    assert x & u == set()
    assert all_names - x - u == {
        *(f"conv_out.{part}" for part in ("weight", "bias")),
        *(f"time_embedding.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")),
    }


def test_notes_name_other_tensors_than_the_papers() -> None:
    assert not ESD(training=ESDTraining(trainable="xattn")).notes()
    assert not ESD(training=ESDTraining(trainable="noxattn")).notes(), "ESD-u is published too"
    assert any("xattn_kv" in note for note in ESD(training=ESDTraining(trainable="xattn_kv")).notes())


def test_u_trains_the_published_number_of_parameters() -> None:
    """859,520,964 of Stable Diffusion 1.x less 43,962,560 of cross-attention, 11,524 and 2,050,560 of the two ends."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    assert sum(p.numel() for p in select(unet, "noxattn").values()) == 813_496_320


@pytest.mark.parametrize(("start", "eta"), [("empty", 1.0), ("concept", 2.0)])
def test_the_prediction_moves_away_from_the_concept(model: Model, start: str, eta: float) -> None:
    """On fixed noise, the student's prediction for the concept approaches 2 c₀ − c; only declared tensors change."""
    esd = ESD(eta=eta, start=start, training=QUICK)  # type: ignore[arg-type]
    concept, c_0 = words(model, "gun"), encode.encode_text(model, [""])
    delta = esd.erase(model, [concept], ErasureContext(1))
    g = torch.Generator().manual_seed(5)
    z, t = torch.randn(16, 4, 4, 4, generator=g), torch.linspace(50, 950, 16).long()
    with torch.no_grad():
        before, after, empty = (
            predict(model, w, z, t, c)
            for w, c in (({}, concept.states), (edited_weights(model, delta), concept.states), ({}, c_0))
        )
    target = 2 * empty - before
    assert (before - target).square().mean() > 1e-5, "the effect exists before"
    assert (after - target).square().mean() < 0.5 * (before - target).square().mean(), "and mostly gone after"
    assert set(delta.tensors) == esd.touched_parameters(model)


@pytest.mark.parametrize(
    ("trainable", "trajectory_model"), [("xattn", "teacher"), ("xattn", "base"), ("noxattn", "teacher")]
)
def test_three_iterations_equal_the_algorithm_written_out(model: Model, trainable: str, trajectory_model: str) -> None:
    """Three iterations against a second network, plain Adam and diffusers' own DDIM: the student, or the base
    model, makes a fresh trajectory to a random step, and the student itself is returned.
    """
    config = {
        "iterations": 3,
        "lr": 1e-3,
        "sampler_steps": 5,
        "trajectory_model": trajectory_model,
        "trainable": trainable,
    }
    delta = ESD(eta=3.0, training=config).erase(model, [words(model, "gun", "sword")], ErasureContext(7))  # type: ignore[arg-type]

    c, c_0 = words(model, "gun", "sword").states, encode.encode_text(model, [""])
    student = copy.deepcopy(model.unet)
    parameters = {n: p.requires_grad_() for n, p in student.named_parameters() if n in delta.tensors}
    adam = torch.optim.Adam(parameters.values(), lr=1e-3)
    scheduler = tiny.parts()["scheduler"]
    scheduler.set_timesteps(5)
    g = generator(7, "erase", "trajectories")
    for i in range(3):
        k, c_i = int(torch.randint(5, (1,), generator=g)), c[[i % 2]]
        z = torch.randn(1, 4, 4, 4, generator=g)
        generating = student if trajectory_model == "teacher" else model.unet
        with torch.no_grad():
            for t in scheduler.timesteps[:k]:
                of_0, of_c = generating(z, t, c_0).sample, generating(z, t, c_i).sample
                z = scheduler.step(of_0 + 3 * (of_c - of_0), t, z).prev_sample
            t = scheduler.timesteps[k]
            of_0, of_c = model.unet(z, t, c_0).sample, model.unet(z, t, c_i).sample
        adam.zero_grad()
        (student(z, t, c_i).sample - (of_0 - 3 * (of_c - of_0))).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        adam.step()
    base = dict(model.unet.named_parameters())
    off = torch.cat([(d - (parameters[n].detach() - base[n])).flatten() for n, d in delta.tensors.items()])
    moved = torch.cat([d.flatten() for d in delta.tensors.values()])
    assert off.norm() < 1e-2 * moved.norm()


def test_nothing_to_erase_has_no_loss_and_is_refused(model: Model) -> None:
    """c = c₀: the target is the empty prompt's own prediction, so the gradient is 0."""
    empty_concept = Concept("nothing", "words", ("",), (("", "", ""),), encode.encode_text(model, [""]), ((),), (1,))
    norms: list[float] = []
    esd = ESD(training={**QUICK, "iterations": 3})
    with pytest.raises(ErasureRefused, match="nothing was erased"):
        esd.erase(
            model, [empty_concept], ErasureContext(0, on_step=lambda p: norms.append(p.state.curve[-1]["grad_norm"]))
        )
    assert max(norms) < 1e-6


def test_defaults_are_those_of_the_first_release() -> None:
    training = ESD().training
    assert (training.trainable, training.iterations, training.lr, training.weight_decay, training.ema_decay) == (
        "xattn",
        1000,
        1e-5,
        0.0,
        0.0,
    )
    assert (
        training.guidance_scale,
        training.sampler_steps,
        training.batch_size,
        training.trajectories,
        training.trajectory_model,
    ) == (
        3.0,
        50,
        1,
        "fresh",
        "teacher",
    )
    assert ESD(training={"preset": "fast"}).training.iterations == 1000, "a preset changes only what it names"  # type: ignore[arg-type]

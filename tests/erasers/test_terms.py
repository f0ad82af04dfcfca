"""What the loss terms of all fine-tuning erasers have in common: networks, conditions, weights, random numbers."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from plugin_examples import random_images
from torch import Tensor

from deleatur.diffusion import encode
from deleatur.diffusion.model import Model
from deleatur.erasers import Eraser
from deleatur.erasers.abo import AllButOne, guidance_target
from deleatur.erasers.esd import ESD, negative_guidance_target
from deleatur.erasers.safegen import SafeGen
from deleatur.erasers.sdd import SDD, unconditional_target
from deleatur.erasers.sfd import SFD
from deleatur.records.model import RatedImages
from deleatur.training.loop import ErasureContext
from deleatur.training.losses import Denoiser, Denoisers, TargetFunction, TrajectoryTerm, mean_squared_error
from deleatur.training.parameters import select
from deleatur.training.trajectories import TrajectoryStates

NAMES = ("gun", "sword", "cat")
POOL: dict[str, Any] = {"trajectories": "pool", "pool_size": 8, "batch_size": 3, "sampler_steps": 4}
NETWORKS = ("student", "teacher", "base")


class Captured(Exception):
    pass


def loss_terms(model: Model, eraser: Eraser, monkeypatch: pytest.MonkeyPatch, seed: int = 1) -> dict[str, Any]:
    """The terms that the eraser passes to the training loop."""
    terms: dict[str, Any] = {}

    def capture(_model: Model, _config: object, passed: dict[str, Any], **_: object) -> None:
        terms.update(passed)
        raise Captured

    monkeypatch.setattr(sys.modules[type(eraser).__module__], "finetune", capture)
    concept = encode.concept_from_words(model, "weapon", NAMES)
    concept = replace(concept, images=RatedImages(random_images(4), random_images(3)))
    with pytest.raises(Captured):
        eraser.erase(model, [concept], ErasureContext(seed, encode.encode_text(model, ["a dog", "ink"])))
    return terms


def denoisers(model: Model, *moved: str) -> Denoisers:
    """The base model three times, except those networks that have moved."""
    weights = {n: p + 0.1 for n, p in select(model.unet, "xattn").items()}
    return Denoisers(*(Denoiser(model, weights if name in moved else {}) for name in NETWORKS))


@pytest.mark.parametrize(
    ("target", "network"),
    [
        (lambda c, c_0: unconditional_target(c_0, frozen=False), "student"),
        (lambda c, c_0: unconditional_target(c_0, frozen=True), "base"),
        (lambda c, c_0: negative_guidance_target(c, c_0, -1.0), "base"),
        (lambda c, c_0: guidance_target(c, c_0), "base"),
    ],
)
@torch.no_grad()
def test_a_target_is_of_one_network(model: Model, target: Any, network: str) -> None:
    of_target: TargetFunction = target(encode.encode_text(model, NAMES), encode.encode_text(model, [""]))
    z, t = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([100, 800])
    still = of_target(denoisers(model), z, t, torch.tensor([1, 0]))
    moves = [
        name
        for name in NETWORKS
        if not torch.equal(of_target(denoisers(model, name), z, t, torch.tensor([1, 0])), still)
    ]
    assert moves == [network]


@pytest.mark.parametrize(
    "eraser",
    [
        SDD(order="single", training=POOL),  # type: ignore[arg-type]
        ESD(training=POOL),  # type: ignore[arg-type]
        AllButOne(alternatives={"weapon": "dog"}, training=POOL),  # type: ignore[arg-type]
    ],
    ids=lambda eraser: type(eraser).__name__,
)
def test_a_state_trains_under_the_condition_that_made_it(
    model: Model, eraser: Eraser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool visits its trajectories in a shuffled order, so that cycling through the conditions would differ."""
    term, states = loss_terms(model, eraser, monkeypatch)["erase"], encode.encode_text(model, NAMES)
    made: list[int] = []
    next_batch = term.trajectories.next_batch

    def record(weights: object) -> Any:
        batch = next_batch(weights)
        made.extend(batch.condition.tolist())
        return batch

    monkeypatch.setattr(term.trajectories, "next_batch", record)
    trained: list[Tensor] = []
    with torch.no_grad():
        for step in range(3):
            trained.extend(term.batch(denoisers(model), step).c[:3])
    assert made != [i % 3 for i in range(9)]
    assert torch.allclose(torch.stack(trained), states[made], atol=1e-6)


TWO_TERMS = [
    (SDD(training={"preservation_weight": 0.3}), (1.0, 0.3)),  # type: ignore[arg-type]
    (SafeGen(censor_weight=0.2, preservation_weight=0.7), (0.2, 0.7)),
    (SFD(forget_weight=0.5, remain_weight=2.0), (0.5, 2.0)),
]


@pytest.mark.parametrize(("eraser", "weights"), TWO_TERMS, ids=lambda value: type(value).__name__)
def test_terms_have_their_weights_and_random_numbers_of_their_own(
    model: Model, eraser: Eraser, weights: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    terms, again, other = (loss_terms(model, eraser, monkeypatch, seed) for seed in (1, 1, 2))
    assert tuple(terms[name].weight for name in ("erase", "keep")) == weights
    seeds, same, others = ([t.generator.initial_seed() for t in run.values()] for run in (terms, again, other))
    assert seeds == same
    assert len({*seeds, *others}) == 4


def test_preserved_prompts_are_sampled_with_the_same_guidance_and_their_own_conditions(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"preservation_weight": 0.3, "guidance_scale": 5.0, "sampler_steps": 4}
    terms = loss_terms(model, SDD(order="single", training=training), monkeypatch)  # type: ignore[arg-type]
    erased, preserved = (terms[name].trajectories.sampler for name in ("erase", "keep"))
    assert (erased.s_g, preserved.s_g) == (5.0, 5.0)
    assert torch.equal(preserved.conditions, encode.encode_text(model, ["a dog", "ink"]))
    assert torch.equal(terms["keep"].c, preserved.conditions)
    base = denoisers(model)
    with torch.no_grad():
        batch = terms["keep"].batch(base, 0)
        assert torch.allclose(batch.target, base.base(batch.z, batch.t, batch.c), atol=1e-5)


@pytest.mark.parametrize("trajectory_model", ["teacher", "base"])
@pytest.mark.parametrize("eraser", [SDD, ESD])
def test_the_configured_network_makes_the_trajectories(
    model: Model, eraser: type[Eraser], trajectory_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {**POOL, "trajectory_model": trajectory_model}
    term = loss_terms(model, eraser(training=training), monkeypatch)["erase"]  # type: ignore[call-arg]
    used: list[object] = []
    next_batch = term.trajectories.next_batch
    monkeypatch.setattr(term.trajectories, "next_batch", lambda weights: used.append(weights) or next_batch(weights))
    networks = denoisers(model, "student", "teacher")
    networks = replace(networks, student=replace(networks.student, weights=dict(networks.student.weights)))
    with torch.no_grad():
        term.batch(networks, 0)
    assert used[0] is getattr(networks, trajectory_model).weights


def test_conditions_to_erase_are_cycled_by_full_batches(model: Model) -> None:
    """A thinned pool returns one state of three: rows 0, 3 mod 2 = 1, 6 mod 2 = 0 of two conditions train."""

    class Thinned:
        def next_batch(self, weights: object) -> TrajectoryStates:
            return TrajectoryStates(torch.zeros(1, 4, 4, 4), torch.tensor([1]), torch.tensor([0]))

    c, c_0 = encode.encode_text(model, ["gun", "sword"]), encode.encode_text(model, [""])
    term = TrajectoryTerm(
        Thinned(),  # type: ignore[arg-type]
        3,
        torch.Generator(),
        torch.tensor(model.schedule.timesteps(4)),
        False,
        c,
        False,
        c_0[:0],
        unconditional_target(c_0, frozen=True),
        mean_squared_error,
    )
    with torch.no_grad():
        batches = [term.batch(denoisers(model), step) for step in range(3)]
    assert [torch.equal(batch.c, c[[i]]) for batch, i in zip(batches, (0, 1, 0), strict=True)] == [True] * 3
    assert [batch.t.tolist() for batch in batches] == [[501]] * 3

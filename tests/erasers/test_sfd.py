"""SFD: no loss where both scores agree, one network call per image, and images without the concept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import network_calls
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from deleatur.detectors.classifier import Classifier
from deleatur.diffusion import encode
from deleatur.diffusion.model import Model, load
from deleatur.diffusion.overlay import add_deltas, edited_weights
from deleatur.diffusion.predict import Weights
from deleatur.diffusion.sample import denoise_one_step, sample
from deleatur.erasers.sfd import SFD, DistillationTerm, FakeScore, score_identity
from deleatur.errors import ModelError, SettingsError
from deleatur.guides.cfg import CFG
from deleatur.records.model import Concept
from deleatur.training.loop import ErasureContext
from deleatur.training.losses import Denoiser, Denoisers

MODELS = Path(__file__).parents[2] / "models"
QUICK: dict[str, Any] = {"iterations": 60, "lr": 3e-3, "batch_size": 4}


def words(model: Model, *names: str) -> Concept:
    return encode.concept_from_words(model, "weapon", names)


def terms(model: Model, alternative: str) -> dict[str, DistillationTerm]:
    """The concept is "gun", and so is the preserved prompt: the two terms can be compared."""
    gun, other = encode.encode_text(model, ["gun"]), encode.encode_text(model, [alternative])
    return SFD(training={"batch_size": 3}).loss_terms(model, gun, other, gun, seed=0)  # type: ignore[arg-type]


def loss(model: Model, term: DistillationTerm, student: dict[str, Tensor]) -> Tensor:
    denoisers = Denoisers(Denoiser(model, student), Denoiser(model, student), Denoiser(model, {}))
    term.trains_fake = False
    term.generator.manual_seed(5)
    with torch.no_grad():
        rows = term.batch(denoisers, 0)
    return term.error(denoisers.student(rows.z, rows.t, rows.c), rows.target)


def leaves(model: Model) -> dict[str, Tensor]:
    return {n: p.detach().clone().requires_grad_() for n, p in model.unet.named_parameters()}


def test_the_loss_by_hand() -> None:
    """x 1, real 3, fake 2, |x − real| 2: 1 (3 − 1 − 1) / 2 = 0.5; for α 2, 1 (3 − 1 − 2) / 2 = 0."""
    x, real, fake = (torch.full((1, 1, 1, 1), value) for value in (1.0, 3.0, 2.0))
    assert score_identity(x, real, fake, 1.0).tolist() == [0.5]
    assert score_identity(x, real, fake, 2.0).tolist() == [0.0]


def test_the_weight_of_the_loss_has_no_gradient() -> None:
    """x 1, real 3, fake 2: d/dx (3 − x − 1) / 2 = −1/2; through w = |x − 3| it would be −1/4."""
    x, real, fake = (torch.full((1, 1, 1, 1), value, requires_grad=True) for value in (1.0, 3.0, 2.0))
    score_identity(x, real.detach(), fake.detach(), 1.0).sum().backward()
    assert x.grad is not None
    assert float(x.grad) == -0.5


@pytest.mark.parametrize("max_grad_norm", [1e-4, 1e6])
def test_the_fake_score_is_guided_and_its_gradient_clipped(model: Model, max_grad_norm: float) -> None:
    """With β₁ = 0 Adam's first moment is the clipped gradient, here of kappa 1 and of kappa 3."""
    gun, empty = encode.encode_text(model, ["gun"]), encode.encode_text(model, [""])
    gradients = []
    for kappa in (1.0, 3.0):
        sfd = SFD(kappa=kappa, training={"batch_size": 2, "max_grad_norm": max_grad_norm})  # type: ignore[arg-type]
        fake = sfd.loss_terms(model, gun, empty, gun, seed=0)["erase"].fake
        with torch.no_grad():
            fake.train_step(Denoiser(model, {}), torch.Generator().manual_seed(0))
        moments = [fake.optimizer.state[w]["exp_avg"].flatten() for w in fake.weights.values()]
        gradients.append(torch.cat(moments))
    assert not torch.allclose(*gradients, rtol=0.1, atol=0)
    assert all((g.norm() <= 1.001 * max_grad_norm) for g in gradients)
    assert all((g.norm() > 1e-3) == (max_grad_norm > 1) for g in gradients)


def test_kappa_guides_both_scores_of_the_generators_loss(model: Model) -> None:
    gun, cat = encode.encode_text(model, ["gun"]), encode.encode_text(model, ["cat"])
    weak, strong = (
        loss(model, SFD(kappa=kappa, training={"batch_size": 3}).loss_terms(model, gun, cat, gun, 0)["erase"], {})  # type: ignore[arg-type]
        for kappa in (1.0, 4.5)
    )
    assert not torch.allclose(weak, strong, rtol=0.1)


def test_alpha_1_has_a_simpler_form() -> None:
    x, real, fake = torch.randn(3, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    w = (x - real).abs().flatten(1).mean(1)
    by_hand = ((real - fake) * (fake - x)).flatten(1).mean(1) / w
    assert torch.allclose(score_identity(x, real, fake, 1.0), by_hand, atol=1e-6)


def test_where_both_scores_agree_the_loss_is_0(model: Model) -> None:
    """At first ψ = φ: the loss of preserved prompts is 0, and so is its gradient."""
    student = leaves(model)
    errors = loss(model, terms(model, "cat")["keep"], student)
    assert errors.abs().max() < 1e-6
    errors.mean().backward()
    assert max(float(p.grad.abs().max()) for p in student.values() if p.grad is not None) < 1e-4
    assert loss(model, terms(model, "cat")["erase"], student).abs().max() > 1e-3, "the concept's is not"


def test_a_concept_that_is_its_own_alternative_has_the_loss_of_a_preserved_prompt(model: Model) -> None:
    student = {n: p.detach() + 0.01 for n, p in leaves(model).items()}
    forget, remain = (terms(model, "gun")[name] for name in ("erase", "keep"))
    for term in (forget, remain):
        for n, w in term.fake.weights.items():
            w.data += 0.02 * torch.randn(w.shape, generator=torch.Generator().manual_seed(len(n)))
    same = loss(model, remain, student)
    assert same.abs().max() > 1e-3
    assert torch.equal(loss(model, forget, student), same)


def test_only_the_generator_has_a_gradient_and_it_passes_through_both_scores(model: Model) -> None:
    student, term = leaves(model), terms(model, "cat")["erase"]
    loss(model, term, student).mean().backward()
    assert all(p.grad is None and not p.requires_grad for p in model.unet.parameters()), "φ has none"
    assert all(w.grad is None for w in term.fake.weights.values()), "nor has ψ, at the generator's turn"
    assert sum(float(p.grad.abs().sum()) for p in student.values() if p.grad is not None) > 0


def test_the_fake_score_learns_to_denoise_what_the_generator_makes(model: Model) -> None:
    fake = (
        SFD(fake_lr=1e-2, kappa=1.0, training={"batch_size": 8})
        .loss_terms(  # type: ignore[arg-type]
            model,
            encode.encode_text(model, ["gun"]),
            encode.encode_text(model, [""]),
            encode.encode_text(model, ["a cat"]),
            0,
        )["erase"]
        .fake
    )
    student, g = Denoiser(model, {}), torch.Generator().manual_seed(0)

    def error() -> float:
        z, t_0, t, eps = fake.sample_noise(64, torch.Generator().manual_seed(9))
        c = torch.cat(fake.conditions)[torch.arange(64) % 2]
        with torch.no_grad():
            x = model.schedule.predict_z0(z, student(z, t_0, c), t_0)
            prediction = fake.denoiser()(model.schedule.add_noise(x, eps, t), t, c)
        return float((prediction - eps).square().mean())

    before = error()
    for _ in range(30):
        with torch.no_grad():
            fake.train_step(student, g)
    assert error() < 0.8 * before


def test_the_fake_score_learns_the_concept_as_often_as_all_preserved_prompts_together(model: Model) -> None:
    """One description of the concept and seven preserved prompts: half of the rows are the concept's."""
    gun = encode.encode_text(model, ["gun"])
    keep = encode.encode_text(model, ["", *(f"a {name}" for name in ("cat", "dog", "ink", "sword", "object", "thing"))])
    sfd = SFD(training={"batch_size": 8})  # type: ignore[arg-type]
    fake = sfd.loss_terms(model, gun, encode.encode_text(model, [""]), keep, seed=0)["erase"].fake
    conditions: list[Tensor] = []
    generator = Denoiser(model, {})

    class Recorder(Denoiser):
        def __call__(self, z: Tensor, t: Tensor, c: Tensor) -> Tensor:
            conditions.extend(c)
            return generator(z, t, c)

    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(20):
            fake.train_step(Recorder(model, {}), g)
    counts = [sum(torch.equal(row, c) for row in conditions) for c in (*gun, *keep)]
    assert counts[0] == sum(counts[1:]) == 160
    assert min(counts[1:]) > 10, "all of them"


def test_an_image_is_one_network_call_without_guide(model: Model) -> None:
    c, guide = encode.encode_text(model, ["a cat", "a dog"]), CFG()
    conditions = guide.conditions(model, [])
    with network_calls.calls() as calls, network_calls.rows() as rows:
        once = sample(model, c, [1, 2], guide=guide, conditions=conditions, steps=8, one_step=625, batch_size=2)
    assert (calls[network_calls.UNET], rows["forward"]) == (1, 2)
    other = sample(model, c, [1, 2], guide=CFG(scale=1.0), conditions={}, steps=3, one_step=625, batch_size=2)
    assert [p.tobytes() for p in once] == [p.tobytes() for p in other]


def test_an_image_is_the_clean_latent_predicted_from_pure_noise(model: Model) -> None:
    n = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    c, t = encode.encode_text(model, ["a cat", "a dog"]), torch.tensor([625, 625])
    a = float(model.schedule.alphas_cumprod[625])
    z = (1 - a) ** 0.5 * n
    with torch.no_grad():
        by_hand = (z - (1 - a) ** 0.5 * model.unet(z, t, c).sample) / a**0.5
    assert torch.allclose(denoise_one_step(model, n, c, 625, {}), by_hand, atol=1e-4)


@pytest.mark.slow
def test_on_the_built_in_model_the_concept_goes_and_the_others_improve() -> None:
    """The judge's opinion of one-step images: few are right before, since the base model needs many steps."""
    model, judge = load(str(MODELS / "pipeline"), device="cpu"), Classifier(path=str(MODELS / "judge")).load()
    gun, others = ["gun"], ["cat", "frog", "fish", "rose"]
    keep = encode.encode_text(model, ["", *(f"a {name}" for name in others)])
    sfd = SFD(kappa=2.0, fake_lr=6e-4, training={"iterations": 8, "lr": 3e-4, "batch_size": 2})  # type: ignore[arg-type]
    concept = encode.concept_from_words(model, "gun", gun, ["a {}"])
    edited = edited_weights(model, sfd.erase(model, [concept], ErasureContext(1, keep)))

    def recognition(weights: Weights, names: list[str]) -> float:
        """Mean probability of the prompt's subject."""
        subjects = [name for name in names for _ in range(16 // len(names))]
        c = encode.encode_text(model, [f"a {name}" for name in subjects])
        images = sample(model, c, range(16), guide=CFG(), conditions={}, steps=1, weights=weights, one_step=625)
        scores = judge.detect(images)
        return float(np.mean([row[judge.labels.index(n)] for row, n in zip(scores, subjects, strict=True)]))

    before, after = ({"gun": recognition(w, gun), "others": recognition(w, others)} for w in ({}, edited))
    print(before, after)
    assert after["gun"] < 0.5 * before["gun"]
    assert after["others"] > before["others"]


def test_the_delta_has_its_timestep_and_adds_to_no_other(model: Model) -> None:
    delta = SFD(training={**QUICK, "iterations": 1}).erase(  # type: ignore[arg-type]
        model, [words(model, "gun")], ErasureContext(1, encode.encode_text(model, [""]))
    )
    assert delta.one_step == 625
    with pytest.raises(ModelError, match="one-step"):
        add_deltas(delta, delta)


def test_the_loss_of_a_batch_written_out(model: Model) -> None:
    """With the same random numbers in the same order; ψ is still the base model."""
    sfd = SFD(start=625, kappa=4.5, alpha=1.2, training={"batch_size": 2})  # type: ignore[arg-type]
    c, c_alt = encode.encode_text(model, ["gun", "sword"]), encode.encode_text(model, ["cat", "dog"])
    base, a = Denoiser(model, {}), model.schedule.alphas_cumprod
    c_0, g = encode.encode_text(model, [""]), torch.Generator().manual_seed(3)
    term = DistillationTerm(FakeScore(model, sfd, c_0, (c, c)), c, c_alt, 1.0, torch.Generator().manual_seed(3))
    with torch.no_grad():
        batch = term.batch(Denoisers(base, base, base), 0)
        output = base(batch.z, batch.t, batch.c)
        loss = term.error(output, batch.target)
        index = torch.randint(2, (2,), generator=g)
        n, eps = torch.randn(2, 2, 4, 4, 4, generator=g)
        t = torch.randint(20, 980, (2,), generator=g)
        z, a_t = (1 - a[625]).sqrt() * n, a[t].reshape(-1, 1, 1, 1)
        x = (z - (1 - a[625]).sqrt() * base(z, torch.tensor([625, 625]), c[index])) / a[625].sqrt()
        x_t = a_t.sqrt() * x + (1 - a_t).sqrt() * eps

        def clean(states: Tensor) -> Tensor:
            eps_0, eps_c = base(x_t, t, c_0), base(x_t, t, states)
            return (x_t - (1 - a_t).sqrt() * (eps_0 + 4.5 * (eps_c - eps_0))) / a_t.sqrt()

        real, fake = clean(c_alt[index]), clean(c[index])
        w = (x - real).abs().mean((1, 2, 3))
        expected = ((real - fake) * (real - x - 1.2 * (real - fake))).mean((1, 2, 3)) / w
    assert torch.equal(batch.c, c[index])
    assert torch.allclose(loss, expected, rtol=1e-3, atol=1e-6)


def test_a_step_of_the_fake_score_depends_on_its_saved_state_alone(model: Model) -> None:
    """A gradient left from the step before would be added to the next one."""
    c, student = encode.encode_text(model, ["gun"]), Denoiser(model, {})
    sfd = SFD(fake_lr=1e-3, training={"batch_size": 2})  # type: ignore[arg-type]
    one, other = (FakeScore(model, sfd, encode.encode_text(model, [""]), (c, c)) for _ in range(2))
    with torch.no_grad():
        one.train_step(student, torch.Generator().manual_seed(0))
        other.restore({n: t.clone() for n, t in one.tensors().items()})
        for fake in (one, other):
            fake.train_step(student, torch.Generator().manual_seed(1), step=1)
    first, second = one.tensors(), other.tensors()
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_the_fake_score_has_its_own_rate_the_generators_beta_and_no_weight_decay(model: Model) -> None:
    sfd = SFD(fake_lr=2e-4, training={"adam_beta1": 0.5, "weight_decay": 0.1})  # type: ignore[arg-type]
    c = encode.encode_text(model, ["gun"])
    [group] = sfd.loss_terms(model, c, c, c, seed=1)["erase"].fake.optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-4, (0.5, 0.999), 0.0)


def test_prompts_to_preserve_are_required(model: Model) -> None:
    with pytest.raises(SettingsError, match="prompts to preserve"):
        SFD().erase(model, [words(model, "gun")], ErasureContext(0))


def test_levels_are_in_order() -> None:
    with pytest.raises(ValidationError, match="the smaller one first, got 980 and 20"):
        SFD(levels=(980, 20))


def test_defaults_are_those_of_the_released_script() -> None:
    sfd = SFD()
    assert (sfd.start, sfd.kappa, sfd.alpha, sfd.levels, sfd.fake_lr) == (625, 4.5, 1.0, (20, 980), 3e-6)
    training = sfd.training
    assert (training.trainable, training.iterations, training.lr) == ("full", 12500, 1e-6)
    assert (training.batch_size, training.adam_beta1) == (8, 0.0)

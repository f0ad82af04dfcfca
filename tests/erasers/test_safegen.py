"""SafeGen: the network denoises positive images to their mosaics, and negative ones to themselves."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from deleatur.diffusion import encode
from deleatur.diffusion.model import Model
from deleatur.diffusion.predict import predict
from deleatur.diffusion.sample import encode_images
from deleatur.erasers.safegen import SafeGen, exact_factor, mosaic
from deleatur.errors import DataError
from deleatur.maths.seeds import generator
from deleatur.records.model import Concept, RatedImages
from deleatur.training.loop import ErasureContext, finetune
from deleatur.training.losses import Batch

QUICK: dict[str, Any] = {"iterations": 80, "lr": 1e-2, "batch_size": 8, "ema_decay": 0.8}


def random_images(n: int, seed: int, size: int = 16) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in range(n)]


@pytest.fixture
def concept(model: Model) -> Concept:
    return replace(
        encode.concept_from_words(model, "weapon", ["gun"]),
        images=RatedImages(random_images(4, 0), random_images(5, 1)),
    )


def test_a_mosaic_by_hand() -> None:
    """4 × 4 pixels in 2 × 2 squares: each is the mean of its four."""
    values = np.array([[0, 4, 100, 100], [8, 8, 100, 100], [20, 20, 10, 30], [20, 20, 50, 70]], np.uint8)
    seen = np.asarray(mosaic(Image.fromarray(values.repeat(3).reshape(4, 4, 3)), 2))[:, :, 0]
    assert seen.tolist() == [[5, 5, 100, 100], [5, 5, 100, 100], [20, 20, 40, 40], [20, 20, 40, 40]]


def test_the_target_of_a_v_prediction_model_leads_to_the_mosaic(model: Model) -> None:
    schedule = replace(model.schedule, prediction_type="v_prediction")
    z_0, z_mosaic = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    safegen = SafeGen(limit=3.0, training={"batch_size": 64})  # type: ignore[arg-type]
    term = safegen.loss_terms(replace(model, schedule=schedule), z_0, z_mosaic, z_0, seed=0)["erase"]
    batch = term.batch(None, 0)  # type: ignore[arg-type]
    below_limit = schedule.alphas_cumprod[batch.t] < 1 - 1 / 9
    implied = schedule.predict_z0(batch.z, batch.target, batch.t)[below_limit]
    assert torch.allclose(implied, z_mosaic.expand_as(implied), atol=1e-5)


@pytest.mark.parametrize("target", ["exact", "released"])
def test_the_target_noise_leads_to_the_mosaic(model: Model, target: str) -> None:
    """ẑ₀ = (z_t − √(1−ᾱ) target) / √ᾱ is the mosaic below the limit, and always the negative image."""
    g = torch.Generator().manual_seed(3)
    z_positive, z_mosaic, z_negative = torch.randn(3, 1, 4, 4, 4, generator=g)
    safegen = SafeGen(target=target, limit=3.0, training={"batch_size": 64})  # type: ignore[arg-type]
    terms = safegen.loss_terms(model, z_positive, z_mosaic, z_negative, seed=0)
    positive, negative = (term.batch(None, 0) for term in terms.values())  # type: ignore[arg-type]

    def implied(batch: Batch) -> Tensor:
        a = model.schedule.alphas_cumprod[batch.t].reshape(-1, 1, 1, 1)
        return (batch.z - (1 - a).sqrt() * batch.target) / a.sqrt()

    assert torch.allclose(implied(negative), z_negative.expand(64, -1, -1, -1), atol=1e-3)
    a = model.schedule.alphas_cumprod[positive.t].reshape(-1, 1, 1, 1)
    noise = (positive.z - a.sqrt() * z_positive) / (1 - a).sqrt()
    if target == "released":
        assert torch.allclose(positive.target, noise + z_positive - z_mosaic, atol=1e-3)
        return
    free = (a / (1 - a)).sqrt().flatten() <= 3
    assert 0 < (~free).sum() < free.sum(), "timesteps on both sides of the limit"
    assert torch.allclose(implied(positive)[free], z_mosaic.expand(int(free.sum()), -1, -1, -1), atol=1e-3)
    assert torch.allclose(positive.target[~free], (noise + 3 * (z_positive - z_mosaic))[~free], atol=1e-3)


def test_the_limit_caps_the_factor(model: Model) -> None:
    """√ᾱ/√(1−ᾱ) by hand: at ᾱ = 0.5 it is 1; at the first timestep it is above 30."""
    a = model.schedule.alphas_cumprod
    half = int((a - 0.5).abs().argmin())
    f = exact_factor(model.schedule, torch.tensor([0, half, 999]), 10.0)
    assert f[0] == 10
    assert f[1] == pytest.approx(1, abs=0.01)
    assert f[2] == pytest.approx(float(a[999] / (1 - a[999])) ** 0.5, rel=1e-5)


def test_only_self_attention_trains(model: Model, concept: Concept) -> None:
    safegen = SafeGen(training={**QUICK, "iterations": 2})  # type: ignore[arg-type]
    delta = safegen.erase(model, [concept], ErasureContext(1))
    assert set(delta.tensors) == safegen.touched_parameters(model)
    assert set(delta.tensors) == {n for n, _ in model.unet.named_parameters() if ".attn1." in n}
    assert all(d.abs().sum() > 0 for n, d in delta.tensors.items() if n.endswith(("to_v.weight", "to_out.0.weight")))


def test_positive_latents_denoise_to_their_mosaics_and_negative_ones_to_themselves(model: Model) -> None:
    """All +1 become 0, all −1 stay −1. Compared with a run without censoring: the share of the way from the image's
    noise to the mosaic's; 0: none, 1: all.
    """
    z_0, c_0 = torch.ones(1, 4, 4, 4), encode.encode_text(model, [""])
    config = {**QUICK, "iterations": 60, "lr": 3e-2}

    def predictions(censor_weight: float) -> list[tuple[Batch, Tensor]]:
        safegen = SafeGen(censor_weight=censor_weight, preservation_weight=0.5, limit=3.0, training=config)  # type: ignore[arg-type]
        terms = safegen.loss_terms(model, z_0, 0 * z_0, -z_0, seed=0)
        delta, _ = finetune(model, safegen.training, terms, c_0=c_0, context=ErasureContext(0))
        weights = {n: model.unet.get_parameter(n) + d for n, d in delta.items()}
        test_terms = safegen.loss_terms(model, z_0, 0 * z_0, -z_0, seed=1).values()
        batches = [replace(term, batch_size=64).batch(None, 0) for term in test_terms]  # type: ignore[arg-type]
        with torch.no_grad():
            return [(batch, predict(model, weights, batch.z, batch.t, c_0)) for batch in batches]

    def share(batch: Batch, without: Tensor, censored: Tensor) -> float:
        """Along f_t (1 − 0), what a mosaic adds to the noise; for negative images, what it would add."""
        a = model.schedule.alphas_cumprod[batch.t].reshape(-1, 1, 1, 1)
        full = (a / (1 - a)).sqrt().clamp(max=3).expand_as(without)
        return float(((censored - without) * full).sum() / full.square().sum())

    positive, negative = (
        share(batch, without, censored)
        for (batch, without), (_, censored) in zip(predictions(0.0), predictions(1.0), strict=True)
    )
    assert positive > 0.05
    assert abs(negative) < 0.3 * positive


def test_without_censoring_it_is_denoising_of_negative_images(model: Model, concept: Concept) -> None:
    """Three iterations of w_p ‖ε_θ(z_t, t, c₀) − ε‖² with AdamW on a second network, averaged."""
    config = {"iterations": 3, "lr": 1e-3, "batch_size": 4, "ema_decay": 0.5, "weight_decay": 0.01}
    delta = SafeGen(censor_weight=0.0, preservation_weight=0.9, training=config).erase(
        model, [concept], ErasureContext(7)
    )  # type: ignore[arg-type]

    network = copy.deepcopy(model.unet)
    student = {n: p.requires_grad_() for n, p in network.named_parameters() if ".attn1." in n}
    base = {n: p.detach().clone() for n, p in student.items()}
    average = {n: p.clone() for n, p in base.items()}
    adam = torch.optim.AdamW(student.values(), lr=1e-3, weight_decay=0.01)
    z_0, c_0 = encode_images(model, concept.images.negative), encode.encode_text(model, [""])  # type: ignore[union-attr]
    g = generator(7, "erase", "passed")
    for _ in range(3):
        i = torch.randint(len(z_0), (4,), generator=g)
        t = torch.randint(1000, (4,), generator=g)
        eps = torch.randn(4, 4, 4, 4, generator=g)
        a = model.schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        prediction = network(a.sqrt() * z_0[i] + (1 - a).sqrt() * eps, t, c_0.expand(4, -1, -1)).sample
        adam.zero_grad()
        (0.9 * torch.nn.functional.mse_loss(prediction, eps)).backward()
        torch.nn.utils.clip_grad_norm_(student.values(), 1.0)
        adam.step()
        average = {n: 0.5 * average[n] + 0.5 * student[n].detach() for n in student}
    for name, difference in delta.tensors.items():
        assert torch.allclose(difference, average[name] - base[name], atol=2e-5), name


@pytest.mark.parametrize("images", [None, RatedImages([], random_images(2, 0)), RatedImages(random_images(2, 0), [])])
def test_missing_positive_or_negative_images_are_refused_before_any_work(
    model: Model, concept: Concept, images: RatedImages | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.unet, "forward", lambda *a, **k: pytest.fail("the network was asked"))
    monkeypatch.setattr(model.vae, "encode", lambda *a, **k: pytest.fail("a picture was encoded"))
    incomplete = replace(concept, name="vice", images=images)
    with pytest.raises(DataError, match="image of vice, got"):
        SafeGen().erase(model, [concept, incomplete], ErasureContext(0))

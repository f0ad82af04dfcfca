"""All-but-One: the concept's guidance becomes its alternative's; the unconditional prediction stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deleatur.diffusion import encode
from deleatur.diffusion.model import Model
from deleatur.diffusion.overlay import edited_weights
from deleatur.diffusion.predict import Weights, predict_pair
from deleatur.erasers.abo import AllButOne, guidance_error, guidance_target
from deleatur.errors import ErasureRefused, SettingsError
from deleatur.maths.guidance import cfg
from deleatur.records.model import Concept
from deleatur.training.loop import ErasureContext
from deleatur.training.losses import Denoiser, Denoisers

QUICK: dict[str, Any] = {"iterations": 35, "lr": 6e-3, "sampler_steps": 4, "batch_size": 4, "pool_size": 16}


def words(model: Model, *names: str) -> Concept:
    return encode.concept_from_words(model, "weapon", names, ["a {}"])


def erase(model: Model, alternative: str, anchor: float = 1.0, **config: Any) -> Weights:
    abo = AllButOne(alternatives={"weapon": alternative}, anchor_weight=anchor, training={**QUICK, **config})  # type: ignore[arg-type]
    return edited_weights(model, abo.erase(model, [words(model, "gun", "sword")], ErasureContext(1)))


def guided(model: Model, weights: Weights, prompt: str, s_g: float) -> Tensor:
    g = torch.Generator().manual_seed(5)
    z, t = torch.randn(16, 4, 4, 4, generator=g), torch.linspace(50, 950, 16).long()
    eps_0, eps_p = predict_pair(
        model, weights, z, t, encode.encode_text(model, [""]), encode.encode_text(model, [prompt])
    )
    return cfg(eps_0, eps_p, s_g)


@pytest.mark.parametrize("alternative", ["cat", ""])
def test_the_concepts_guidance_is_its_alternatives_at_every_scale(model: Model, alternative: str) -> None:
    edited = erase(model, alternative)
    for s_g in (1.0, 3.0, 7.5):
        target = guided(model, {}, "a cat" if alternative else "", s_g)
        before, after = (float((guided(model, w, "a gun", s_g) - target).square().mean()) for w in ({}, edited))
        assert before > 1e-5, "the effect exists before"
        assert after < 0.5 * before, "and mostly gone after"


def test_the_anchor_holds_the_unconditional_prediction(model: Model) -> None:
    before = guided(model, {}, "", 1.0)
    loose, anchored = (
        float((guided(model, erase(model, "cat", anchor), "", 1.0) - before).square().mean()) for anchor in (0.0, 10.0)
    )
    assert anchored < 0.7 * loose


def test_the_target_is_the_alternatives_guidance_over_the_empty_prompt(model: Model) -> None:
    base = Denoiser(model, {})
    denoisers = Denoisers(base, base, base)
    c_0, c_alt = encode.encode_text(model, [""]), encode.encode_text(model, ["a cat", "a dog"])
    z, t = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([100, 800])
    with torch.no_grad():
        target = guidance_target(c_alt, c_0)(denoisers, z, t, torch.tensor([1, 0]))
        empty, zero = base(z, t, c_0), guidance_target(c_0, c_0)(denoisers, z, t, torch.tensor([0, 0]))
        assert torch.allclose(target, torch.cat([base(z, t, c_alt.flip(0)) - empty, empty]), atol=1e-6)
    assert torch.equal(zero[:2], torch.zeros_like(z)), "an empty alternative is no guidance, exactly"


def test_the_loss_by_hand() -> None:
    """One pixel each: prediction 5 and 2, wanted guidance 1 and 1.5: (5 − 2 − 1)² + 10 (2 − 1.5)² = 6.5."""
    one = torch.ones(1, 1, 1, 1)
    prediction, target = torch.cat([5 * one, 2 * one]), torch.cat([one, 1.5 * one])
    assert guidance_error(10.0)(prediction, target).tolist() == [6.5]


def test_the_guidance_term_is_invariant_to_a_shift_of_both_predictions() -> None:
    g = torch.Generator().manual_seed(0)
    prediction, target, shift = (torch.randn(n, 4, 4, 4, generator=g) for n in (6, 6, 3))
    assert torch.allclose(
        guidance_error(0.0)(prediction + torch.cat([shift, shift]), target),
        guidance_error(0.0)(prediction, target),
        atol=1e-5,
    )
    assert not torch.allclose(
        guidance_error(1.0)(prediction + torch.cat([shift, shift]), target), guidance_error(1.0)(prediction, target)
    )


def test_with_the_concept_for_its_own_alternative_nothing_happens(model: Model) -> None:
    """Both terms are exactly 0 from the first step: no weight moves."""
    losses: list[float] = []
    abo = AllButOne(alternatives={"weapon": "gun"}, training={**QUICK, "iterations": 3})
    with pytest.raises(ErasureRefused, match="nothing was erased"):
        abo.erase(model, [words(model, "gun")], ErasureContext(0, on_step=lambda p: losses.append(p.loss)))
    assert losses == [0.0, 0.0, 0.0]


def test_the_alternative_takes_the_concepts_place(model: Model) -> None:
    rows = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    soft = Concept("weapon", "token", (), (("a picture of a ", rows, ""),), torch.zeros(1, 16, 16), ((),), (7,))
    assert torch.equal(encode.encode_replacement(model, soft, "cat"), encode.encode_text(model, ["a picture of a cat"]))
    both = encode.encode_replacement(model, words(model, "gun", "sword"), "")
    assert torch.equal(both, encode.encode_text(model, ["", ""]))


def test_each_concept_has_its_own_alternative(model: Model) -> None:
    """Erasing {gun → cat} and {ink → dog} at once: each comes nearer to its own than to the other's."""
    concepts = [encode.concept_from_words(model, name, [name]) for name in ("gun", "ink")]
    abo = AllButOne(alternatives={"gun": "cat", "ink": "dog", "style": "object"}, training=QUICK)  # type: ignore[arg-type]
    after = edited_weights(model, abo.erase(model, concepts, ErasureContext(1)))
    targets = {alt: guided(model, {}, alt, 1.0) for alt in ("cat", "dog")}
    for name, alternative, other in (("gun", "cat", "dog"), ("ink", "dog", "cat")):
        prediction = guided(model, after, name, 1.0)
        assert (prediction - targets[alternative]).square().mean() < (prediction - targets[other]).square().mean()


def test_a_concept_without_alternative_is_refused_before_any_work(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.unet, "forward", lambda *a, **k: pytest.fail("the network was called"))
    monkeypatch.setattr(model.text_encoder, "forward", lambda *a, **k: pytest.fail("the text encoder was called"))
    gun = Concept("gun", "words", ("gun",), (("", "gun", ""),), torch.zeros(1, 16, 16), ((1,),), (2,))
    with pytest.raises(SettingsError, match="alternative to gun") as e:
        AllButOne(alternatives={"ink": "dog"}).erase(model, [gun], ErasureContext(0))
    assert "gun: toy" in e.value.hint


def test_notes_name_the_reconstruction() -> None:
    assert any("reconstruction" in note for note in AllButOne(alternatives={}).notes())

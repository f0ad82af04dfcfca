"""One sampler: equal to diffusers' pipeline, independent of batches, exact with a delta on and off."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline

from deleatur.diffusion import encode
from deleatur.diffusion.model import Model, fingerprint
from deleatur.diffusion.overlay import add, applied, difference, weights_of
from deleatur.diffusion.predict import predict
from deleatur.diffusion.sample import decode, encode_pictures, noise, sample
from deleatur.errors import ModelError, SettingsError
from deleatur.guides.cfg import CFG
from deleatur.records.model import Delta
from deleatur.training.parameters import RULES, select


def draw(
    model: Model, seeds: list[int], batch: int = 4, weights: dict[str, torch.Tensor] | None = None
) -> list[np.ndarray]:
    c, guide = encode.encode_text(model, ["a cat"] * len(seeds)), CFG()
    plain = guide.conditions(model, [])
    pictures = sample(model, c, seeds, guide=guide, conditions=plain, steps=4, weights=weights, batch=batch)
    return [np.asarray(p) for p in pictures]


def moved(model: Model, size: float = 0.1) -> Delta:
    g = torch.Generator().manual_seed(0)
    own = select(model.unet, "xattn")
    return Delta(
        {n: size * torch.randn(p.shape, generator=g) for n, p in own.items()}, model.digest, "test", {}, ("x",)
    )


def test_equals_plain_diffusers_from_the_same_noise(model: Model) -> None:
    pipe = StableDiffusionPipeline(
        **tiny.parts(), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    z = noise(model, [7])
    theirs = pipe("a cat", num_inference_steps=4, guidance_scale=7.5, latents=z, output_type="pil").images[0]
    assert np.abs(np.asarray(theirs, int) - draw(model, [7], batch=1)[0]).max() <= 1


def test_a_picture_does_not_depend_on_how_many_others_are_drawn(model: Model) -> None:
    alone, together = draw(model, [3]), draw(model, [1, 2, 3, 4, 5, 6])
    assert np.array_equal(alone[0], together[2])


def test_all_predictions_of_a_step_are_one_network_call_and_a_condition_is_the_mean_of_its_sentences(
    model: Model,
) -> None:
    rows, (c, *spoken) = [], encode.encode_text(model, ["a dog", "", "gun", "sword", "cat"]).split(1)
    conditions = {"one": spoken[0], "three": torch.cat(spoken[1:])}
    seen: list[dict[str, torch.Tensor]] = []

    class Watch(CFG):
        def combine(self, step, eps_p, eps, state):  # type: ignore[no-untyped-def]
            seen.append({"p": eps_p, **eps})
            return super().combine(step, eps_p, {"": eps["one"]}, state)

    hook = model.unet.register_forward_hook(lambda unet, args, out: rows.append(len(args[0])))
    try:
        sample(model, c, [5], guide=Watch(), conditions=conditions, steps=3, batch=2)
    finally:
        hook.remove()
    assert rows == [2 * 5] * 3
    z, t = noise(model, [5, 5]), torch.full((2,), model.schedule.taus(3)[0])
    each = [predict(model, {}, z, t, one) for one in spoken[1:]]
    assert torch.allclose(seen[0]["three"], torch.stack(each).mean(0), atol=1e-6)
    assert torch.allclose(seen[0]["one"], predict(model, {}, z, t, spoken[0]), atol=1e-6)


def test_different_seeds_give_different_pictures(model: Model) -> None:
    one, two = draw(model, [1, 2])
    assert not np.array_equal(one, two)


def test_a_delta_laid_over_changes_pictures_and_leaves_the_model_alone(model: Model) -> None:
    before, plain = fingerprint(model.unet), draw(model, [1])
    delta = moved(model)
    changed = draw(model, [1], weights=weights_of(model, delta))
    assert not np.array_equal(plain[0], changed[0])
    assert fingerprint(model.unet) == before
    assert np.array_equal(plain[0], draw(model, [1])[0])


def test_applied_equals_laid_over_and_comes_off_to_the_bit(model: Model) -> None:
    before, delta = fingerprint(model.unet), moved(model)
    over = draw(model, [1], weights=weights_of(model, delta))
    with applied(model, delta):
        assert fingerprint(model.unet) != before
        assert np.array_equal(draw(model, [1])[0], over[0])
    assert fingerprint(model.unet) == before


def test_a_difference_gives_the_weights_back(model: Model) -> None:
    delta = moved(model)
    weights = weights_of(model, delta)
    again = Delta(difference(model, weights), model.digest, "test", {}, ())
    for name, weight in weights_of(model, again).items():
        assert torch.allclose(weight, weights[name], atol=1e-7)


def test_a_delta_of_another_base_is_refused(model: Model) -> None:
    with pytest.raises(ModelError, match="made for base"):
        weights_of(tiny.model(seed=1), moved(model))


def test_deltas_add_by_tensor(model: Model) -> None:
    both = add(moved(model), moved(model))
    name = next(iter(both.tensors))
    assert torch.equal(both.tensors[name], 2 * moved(model).tensors[name])
    assert both.concepts == ("x", "x")


@pytest.mark.parametrize("rule", sorted(RULES))
def test_selectors_take_what_they_say(model: Model, rule: str) -> None:
    names = set(select(model.unet, rule))  # type: ignore[arg-type]
    every = {n for n, _ in model.unet.named_parameters()}
    expected = {
        "xattn": {n for n in every if ".attn2." in n},
        "xattn_kv": {n for n in every if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))},
        "selfattn": {n for n in every if ".attn1." in n},
        "full": every,
    }
    if rule in expected:
        assert names == expected[rule]
    else:
        assert not {"conv_out.weight", "time_embedding.linear_1.weight"} & names
        assert any("time_emb_proj" in n for n in names)
    if rule != "full":
        with pytest.raises(SettingsError, match="matches no tensor"):
            select(torch.nn.ModuleDict({"time_embedding": torch.nn.Linear(1, 1)}), rule)  # type: ignore[arg-type]


def test_pictures_encode_to_the_shape_of_latents(model: Model) -> None:
    z = noise(model, [1, 2])
    assert encode_pictures(model, decode(model, z)).shape == z.shape

"""The sampler equals diffusers' pipeline, is independent of batching, and exact with a delta applied and removed."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor

from deleatur.diffusion import encode
from deleatur.diffusion.model import Model, digest_module
from deleatur.diffusion.overlay import add_deltas, applied, edited_weights, weight_difference
from deleatur.diffusion.predict import predict
from deleatur.diffusion.sample import decode_latents, denoise, encode_images, initial_noise, sample
from deleatur.errors import ModelError, SettingsError
from deleatur.guides.cfg import CFG
from deleatur.records.model import Delta
from deleatur.training.parameters import RULES, select


def generate(
    model: Model, seeds: list[int], batch: int = 4, weights: dict[str, torch.Tensor] | None = None
) -> list[np.ndarray]:
    c, guide = encode.encode_text(model, ["a cat"] * len(seeds)), CFG()
    conditions = guide.conditions(model, [])
    images = sample(model, c, seeds, guide=guide, conditions=conditions, steps=4, weights=weights, batch_size=batch)
    return [np.asarray(p) for p in images]


def random_delta(model: Model, size: float = 0.1) -> Delta:
    g = torch.Generator().manual_seed(0)
    selected = select(model.unet, "xattn")
    return Delta(
        {n: size * torch.randn(p.shape, generator=g) for n, p in selected.items()},
        model.unet_digest,
        "test",
        {},
        ("x",),
    )


def test_sampling_equals_diffusers_with_the_same_seed(model: Model) -> None:
    """Up to the rounding of single pixels; truncation would differ in half of them."""
    pipe = StableDiffusionPipeline(
        **tiny.parts(), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(7)
    theirs = pipe("a cat", num_inference_steps=4, guidance_scale=7.5, generator=g, output_type="pil").images[0]
    assert np.abs(np.asarray(theirs, int) - generate(model, [7], batch=1)[0]).mean() < 0.01


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_a_bfloat16_networks_trajectory_is_computed_in_fp32(scale: float) -> None:
    """Against the formulas in float64 around the same network calls. Latents or guidance in bfloat16 would lose three
    digits.
    """
    network, guide = tiny.model(dtype=torch.bfloat16), CFG(scale=scale)
    c, schedule = encode.encode_text(network, ["a cat"]), network.schedule
    conditions = guide.conditions(network, [])
    z = initial_noise(network, [7])
    ours = denoise(network, z, c, conditions, guide, 4, {})
    rows, expected = torch.cat([c, *conditions.values()]), z.double()
    a_bar = [float(a) for a in schedule.alphas_cumprod.double()]
    for tau in (751, 501, 251, 1):
        with torch.no_grad():
            z_t, t = expected.bfloat16().expand(len(rows), -1, -1, -1), torch.full((len(rows),), tau)
            eps_p, *eps_0 = network.unet(z_t, t, rows).sample.double().split(1)
        eps = eps_0[0] + scale * (eps_p - eps_0[0]) if eps_0 else eps_p
        a, a_next = a_bar[tau], a_bar[max(tau - 250, 0)]
        expected = a_next**0.5 * (expected - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - a_next) ** 0.5 * eps
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, expected.float(), atol=1e-4 * float(expected.abs().max()))


def test_an_image_does_not_depend_on_the_number_of_images(model: Model) -> None:
    alone, together = generate(model, [3]), generate(model, [1, 2, 3, 4, 5, 6])
    assert np.array_equal(alone[0], together[2])


def test_each_step_is_one_network_call_and_a_condition_is_the_mean_over_its_prompts(
    model: Model,
) -> None:
    rows, (c, *states) = [], encode.encode_text(model, ["a dog", "", "gun", "sword", "cat"]).split(1)
    conditions = {"one": states[0], "three": torch.cat(states[1:])}
    recorded: list[dict[str, torch.Tensor]] = []

    class RecordingGuide(CFG):
        def combine(self, step, eps_p, eps, state):  # type: ignore[no-untyped-def]
            recorded.append({"p": eps_p, **eps})
            return super().combine(step, eps_p, {"": eps["one"]}, state)

    hook = model.unet.register_forward_hook(lambda unet, args, out: rows.append(len(args[0])))
    try:
        sample(model, c, [5], guide=RecordingGuide(), conditions=conditions, steps=3, batch_size=2)
    finally:
        hook.remove()
    assert rows == [2 * 5] * 3
    z, t = initial_noise(model, [5, 5]), torch.full((2,), model.schedule.timesteps(3)[0])
    each = [predict(model, {}, z, t, one) for one in states[1:]]
    assert torch.allclose(recorded[0]["three"], torch.stack(each).mean(0), atol=1e-6)
    assert torch.allclose(recorded[0]["one"], predict(model, {}, z, t, states[0]), atol=1e-6)


def test_different_seeds_give_different_images(model: Model) -> None:
    one, two = generate(model, [1, 2])
    assert not np.array_equal(one, two)


def test_edited_weights_change_images_and_leave_the_model_unchanged(model: Model) -> None:
    before, plain = digest_module(model.unet), generate(model, [1])
    delta = random_delta(model)
    changed = generate(model, [1], weights=edited_weights(model, delta))
    assert not np.array_equal(plain[0], changed[0])
    assert digest_module(model.unet) == before
    assert np.array_equal(plain[0], generate(model, [1])[0])


def test_an_applied_delta_equals_edited_weights_and_is_removed_exactly(model: Model) -> None:
    before, delta = digest_module(model.unet), random_delta(model)
    edited = generate(model, [1], weights=edited_weights(model, delta))
    with applied(model, delta):
        assert digest_module(model.unet) != before
        assert np.array_equal(generate(model, [1])[0], edited[0])
    assert digest_module(model.unet) == before


def test_weight_difference_inverts_edited_weights(model: Model) -> None:
    delta = random_delta(model)
    weights = edited_weights(model, delta)
    again = Delta(weight_difference(model, weights), model.unet_digest, "test", {}, ())
    for name, weight in edited_weights(model, again).items():
        assert torch.allclose(weight, weights[name], atol=1e-7)


def test_a_delta_of_another_base_is_refused(model: Model) -> None:
    with pytest.raises(ModelError, match="has base"):
        edited_weights(tiny.model(seed=1), random_delta(model))


def test_deltas_are_added_by_tensor(model: Model) -> None:
    both = add_deltas(random_delta(model), random_delta(model))
    name = next(iter(both.tensors))
    assert torch.equal(both.tensors[name], 2 * random_delta(model).tensors[name])
    assert both.concepts == ("x", "x")
    with pytest.raises(ModelError, match="different bases cannot be added"):
        add_deltas(random_delta(model), random_delta(tiny.model(seed=1)))


@pytest.mark.parametrize("rule", sorted(RULES))
def test_selection_rules_select_the_named_parameters(model: Model, rule: str) -> None:
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


def test_images_are_encoded_as_by_diffusers(model: Model) -> None:
    images = decode_latents(model, initial_noise(model, [1, 2]))
    pixels = VaeImageProcessor().preprocess(images)
    with torch.no_grad():
        expected = model.vae.config.scaling_factor * model.vae.encode(pixels).latent_dist.mean
    assert torch.allclose(encode_images(model, images), expected, atol=1e-6)


def test_a_delta_on_a_bfloat16_network_is_added_in_fp32_and_rounded_once() -> None:
    network = tiny.model(dtype=torch.bfloat16)
    delta = random_delta(network)
    weights, base = edited_weights(network, delta), dict(network.unet.named_parameters())
    for name, weight in weights.items():
        assert torch.equal(weight, (base[name].float() + delta.tensors[name]).bfloat16())
        assert weight.dtype == torch.bfloat16
    for name, difference in weight_difference(network, weights).items():
        assert torch.equal(difference, weights[name].float() - base[name].float())
        assert difference.dtype == torch.float32

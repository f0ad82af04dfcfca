"""NaN is refused wherever it enters: network weights, deltas, tokens, reward heads, latents, pixels, scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from deleatur.detectors import LoadedDetector
from deleatur.detectors.classifier import Classifier
from deleatur.diffusion import encode
from deleatur.diffusion.clip import load_clip
from deleatur.diffusion.model import Model, load
from deleatur.diffusion.overlay import edited_weights
from deleatur.diffusion.sample import decode_latents, encode_images, initial_noise, sample
from deleatur.errors import ModelError
from deleatur.feedback.reward import RewardHead
from deleatur.guides.cfg import CFG
from deleatur.records.model import Delta, SoftToken
from deleatur.storage import tensors

BROKEN = "expected finite values, got NaN or infinity"
IMAGE = Image.new("RGB", (16, 16))


def spoil(path: Path) -> str:
    """Sets one weight to NaN; the name of its tensor."""
    weights = load_file(path)
    name = sorted(n for n, t in weights.items() if t.is_floating_point())[-1]
    weights[name].view(-1)[-1] = math.nan
    save_file(weights, path, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_base_model_with_nan_weights_is_refused(tmp_path: Path, part: str) -> None:
    folder = tiny.save_pipeline(tmp_path / "pipeline")
    name = spoil(next((folder / part).glob("*.safetensors")))
    with pytest.raises(ModelError, match=f"{folder}, {part}: {name}: {BROKEN} in 1 of"):
        load(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("save", "read"),
    [
        (tiny.save_clip, load_clip),
        (lambda folder: tiny.save_classifier(folder, ("gun", "cat")), lambda path: Classifier(path=path).load()),
    ],
)
def test_other_networks_with_nan_weights_are_refused(
    tmp_path: Path, save: Callable[[Path], Path], read: Callable[[str], Any]
) -> None:
    folder = save(tmp_path / "network")
    spoil(folder / "model.safetensors")
    with pytest.raises(ModelError, match=BROKEN):
        read(str(folder))


def test_a_delta_a_token_and_a_reward_head_are_refused_when_read_and_when_written(tmp_path: Path) -> None:
    delta = Delta({"w": torch.zeros(2)}, "0" * 64, "esd", {}, ("weapon",))
    token = SoftToken("weapon", torch.zeros(1, 1, 4))
    tensors.save_delta(tmp_path / tensors.DELTA_FILE, delta)
    tensors.save_token(tmp_path / "token", token)
    for file, name in ((tmp_path / tensors.DELTA_FILE, "w"), (tmp_path / "token" / "01.safetensors", "<weapon-1>")):
        loaded, metadata = tensors.load(file)
        loaded[name].view(-1)[0] = math.nan
        with pytest.raises(ModelError, match=f"{file}, {name}: {BROKEN}"):
            tensors.save(file, loaded, metadata)
        save_file(loaded, file, metadata={"deleatur": "{}"})
        with pytest.raises(ModelError, match=f"{file}, {name}: {BROKEN}"):
            tensors.load(file)


def test_a_delta_in_memory_is_refused(model: Model) -> None:
    name, parameter = next(iter(model.unet.named_parameters()))
    delta = Delta({name: torch.full_like(parameter, math.nan)}, model.unet_digest, "mine", {}, ())
    with pytest.raises(ModelError, match=f"the delta of mine, {name}: {BROKEN}"):
        edited_weights(model, delta)


def test_latents_that_overflow_are_refused_before_they_become_black_images(model: Model) -> None:
    weights = {n: p * 1e30 for n, p in model.unet.named_parameters()}
    guide, c = CFG(), encode.encode_text(model, ["a cat"])
    with pytest.raises(ModelError, match=f"latents that the UNet sampled: {BROKEN}"):
        sample(
            model, c, [1], guide=guide, conditions=guide.conditions(model, []), steps=2, weights=weights, batch_size=1
        )


def test_pixels_and_latents_of_a_broken_vae_are_refused(model: Model) -> None:
    class BrokenVAE(nn.Module):
        config = model.vae.config

        def decode(self, z: torch.Tensor) -> Any:
            return type("Output", (), {"sample": torch.full((1, 3, 16, 16), math.nan)})

        def encode(self, x: torch.Tensor) -> Any:
            distribution = type("Posterior", (), {"mean": torch.full((1, 4, 4, 4), math.inf)})
            return type("Output", (), {"latent_dist": distribution})

    broken = replace(model, vae=BrokenVAE())
    with pytest.raises(ModelError, match=f"pixels that the VAE decoded: {BROKEN}"):
        decode_latents(broken, initial_noise(model, [1]))
    with pytest.raises(ModelError, match=f"latents that the VAE encoded: {BROKEN}"):
        encode_images(broken, [IMAGE])


def test_scores_of_detectors_and_reward_heads_are_refused() -> None:
    detector = LoadedDetector(("gun", "cat"), "0" * 64, lambda images: np.full((len(images), 2), np.nan, np.float32))
    with pytest.raises(ModelError, match=f"labels gun, cat.*{BROKEN} in 2 of 2"):
        detector.detect([IMAGE])
    head = RewardHead(
        {
            "in.weight": torch.zeros(2, 4),
            "in.bias": torch.zeros(2),
            "out.weight": torch.zeros(1, 2),
            "out.bias": torch.zeros(1),
            "mean": torch.zeros(()),
            "std": torch.zeros(()),
        },
        rank=True,
    )
    with pytest.raises(ModelError, match=f"scores of a reward head: {BROKEN} in 3 of 3"):
        head(torch.zeros(3, 4))

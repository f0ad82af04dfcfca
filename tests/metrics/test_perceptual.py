from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from deleatur.diffusion.clip import load_clip
from deleatur.metrics.held_out_reward import HeldOutReward
from deleatur.metrics.perceptual import Perceptual
from deleatur.records.sampling import Prompt


def test_distance_is_the_mean_squared_distance_of_unit_patch_states(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Against transformers' hidden states, image by image; 1 − cos is half of the squared distance."""
    clip = load_clip(str(tiny.save_clip(tmp_path_factory.mktemp("clip"))), "cpu")
    rng = np.random.default_rng(0)
    sample_images, base_images = (
        [Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(2)] for _ in range(2)
    )
    base_images[1] = sample_images[1]
    samples, base = (SimpleNamespace(clip=clip, images=images) for images in (sample_images, base_images))
    values = Perceptual().values(samples, base)  # type: ignore[arg-type]

    def states(image: Image.Image) -> Any:
        pixels = clip.processor.image_processor(images=[image], return_tensors="pt").pixel_values
        with torch.no_grad():
            return clip.model.vision_model(pixels, output_hidden_states=True).hidden_states

    layers = zip(states(sample_images[0]), states(base_images[0]), strict=True)
    distances = [2 - 2 * torch.cosine_similarity(a[0, 1:], b[0, 1:], dim=-1) for a, b in layers]
    assert values[0] == pytest.approx(float(torch.stack(distances).mean()), rel=1e-4)
    assert values[0] > 0.01
    assert values[1] == 0, "the same image"


def test_held_out_reward_uses_the_head_of_the_prompts_concept() -> None:
    roles = [("weapon", "concept"), ("", "unseen"), ("ink", "concept")]
    prompts = [Prompt(str(i), "", role, "", concept) for i, (concept, role) in enumerate(roles)]  # type: ignore[arg-type]
    rewards = {n: SimpleNamespace(values=torch.tensor(v)) for n, v in (("weapon", [0.1, 0.2, 0.3]), ("ink", [4, 5, 6]))}
    values = HeldOutReward().values(SimpleNamespace(prompts=prompts, rewards=rewards), None)  # type: ignore[arg-type]
    assert values[[0, 2]] == pytest.approx([0.1, 6])
    assert np.isnan(values[1])

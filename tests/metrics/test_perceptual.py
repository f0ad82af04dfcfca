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


def test_it_is_the_mean_over_layers_and_patches_of_the_squared_distance_of_unit_states(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Against transformers' own hidden states, picture by picture; 1 − cos is half of the squared distance."""
    clip = load_clip(str(tiny.save_clip(tmp_path_factory.mktemp("clip"))), "cpu")
    rng = np.random.default_rng(0)
    mine, theirs = ([Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)) for _ in range(2)] for _ in range(2))
    theirs[1] = mine[1]
    ours, base = (SimpleNamespace(clip=clip, pictures=pictures) for pictures in (mine, theirs))
    found = Perceptual().values(ours, base)  # type: ignore[arg-type]

    def states(picture: Image.Image) -> Any:
        pixels = clip.processor.image_processor(images=[picture], return_tensors="pt").pixel_values
        with torch.no_grad():
            return clip.model.vision_model(pixels, output_hidden_states=True).hidden_states

    layers = zip(states(mine[0]), states(theirs[0]), strict=True)
    apart = [2 - 2 * torch.cosine_similarity(a[0, 1:], b[0, 1:], dim=-1) for a, b in layers]
    assert found[0] == pytest.approx(float(torch.stack(apart).mean()), rel=1e-4)
    assert found[0] > 0.01
    assert found[1] == 0, "the same picture"


def test_the_held_out_reward_is_that_of_the_prompts_own_concept() -> None:
    asks = [("weapon", "concept"), ("", "unseen"), ("ink", "concept")]
    prompts = [Prompt(str(i), "", role, "", concept) for i, (concept, role) in enumerate(asks)]  # type: ignore[arg-type]
    rewards = {n: SimpleNamespace(values=torch.tensor(v)) for n, v in (("weapon", [0.1, 0.2, 0.3]), ("ink", [4, 5, 6]))}
    found = HeldOutReward().values(SimpleNamespace(prompts=prompts, rewards=rewards), None)  # type: ignore[arg-type]
    assert found[[0, 2]] == pytest.approx([0.1, 6])
    assert np.isnan(found[1])

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny

from deleatur.diffusion.clip import Clip, load_clip
from deleatur.metrics.clip_score import ClipScore
from deleatur.records.sampling import Prompt

PROMPTS = (Prompt("1", "a cat", "unseen", ""), Prompt("2", "a gun", "concept", "", "weapon"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return load_clip(str(tiny.save_clip(tmp_path_factory.mktemp("clip"))), "cpu")


@pytest.mark.parametrize("prefix", ["", "a picture of "])
def test_identical_embeddings_score_one_and_concept_prompts_nan(clip: Clip, prefix: str) -> None:
    """Weight 1, not 2.5 or 100; the image embeddings equal those of their captions."""
    samples: Any = SimpleNamespace(
        prompts=PROMPTS, clip=clip, features=clip.embed_texts([prefix + p.text for p in PROMPTS])
    )
    [harmless, with_concept] = ClipScore(prefix=prefix).values(samples, samples)
    assert harmless == pytest.approx(1, abs=1e-6)
    assert np.isnan(with_concept)
    [mismatched, _] = ClipScore(prefix=prefix + "dog ").values(samples, samples)
    assert mismatched < 1 - 1e-4

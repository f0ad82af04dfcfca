"""The interval of a number that belongs to a whole set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import workspace

from deleatur.metrics import Gallery
from deleatur.metrics.frechet import Frechet
from deleatur.stages.evaluate import _set_interval


@pytest.mark.parametrize(("prompts", "known"), [(1, False), (8, True)])
def test_pictures_of_one_prompt_tell_nothing_about_other_prompts(tmp_path: Any, prompts: int, known: bool) -> None:
    settings = workspace.make(tmp_path)
    x, y = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0))
    base, ours = (Gallery([], [], lambda keys: [], {}, f, None, {}, {}) for f in (x, y + 1))  # type: ignore[arg-type]
    clusters, rows = np.arange(16) % prompts, np.ones(16, bool)
    found = _set_interval(settings, Frechet(), ours, base, clusters, rows, "attack")
    assert found.value == pytest.approx(Frechet().of_set(y + 1, x))
    assert bool(np.isfinite([found.low, found.high]).all()) is known
    assert not known or found.low < found.value < found.high

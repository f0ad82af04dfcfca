"""Confidence interval of a set metric."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import workspace

from deleatur.evaluation.scores import bootstrap_interval
from deleatur.metrics import EvaluationSet
from deleatur.metrics.frechet import Frechet


@pytest.mark.parametrize(("prompts", "is_defined"), [(1, False), (8, True)])
def test_interval_needs_images_of_several_prompts(tmp_path: Any, prompts: int, is_defined: bool) -> None:
    settings = workspace.create(tmp_path)
    x, y = torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0))
    base, samples = (EvaluationSet([], [], lambda keys: [], {}, f, None, {}, {}) for f in (x, y + 1))  # type: ignore[arg-type]
    clusters, rows = np.arange(16) % prompts, np.ones(16, bool)
    score = bootstrap_interval(settings, Frechet(), samples, base, clusters, rows, "attack")
    assert score.value == pytest.approx(Frechet().of_set(y + 1, x))
    assert bool(np.isfinite([score.low, score.high]).all()) is is_defined
    assert not is_defined or score.low < score.value < score.high

"""A metric's values are finite, or NaN where it has none: an infinite one would drop its score without a word."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from deleatur.errors import ModelError
from deleatur.evaluation.cache import EvaluationCache
from deleatur.evaluation.scores import metric_values
from deleatur.metrics import Array, EvaluationSet, Metric
from deleatur.records.sampling import Prompt


class Fixed(Metric):
    higher_is_better: ClassVar[bool] = True
    listed: Sequence[Any]

    def values(self, samples: EvaluationSet, base: EvaluationSet) -> Array:
        return np.array([{"inf": math.inf, "nan": math.nan}.get(value, value) for value in self.listed], float)

    def detector(self, samples: EvaluationSet) -> None:
        return None


@pytest.mark.parametrize(("last", "refused"), [("inf", True), ("nan", False), (2.0, False)])
def test_infinite_values_are_refused(tmp_path: Path, last: object, refused: bool) -> None:
    prompts = [Prompt(str(i), f"a {i}", "unseen", "") for i in range(2)]
    clip: Any = SimpleNamespace(digest="")
    images = EvaluationSet(prompts, ["a", "b"], lambda keys: [], {}, torch.zeros(2, 1), clip, {}, {})
    cache = EvaluationCache(tmp_path)

    def values() -> Array:
        return metric_values(cache, Fixed(listed=[1.0, last]), {"base": images}, lambda n: None)["base"]

    if refused:
        with pytest.raises(ModelError, match="values of Fixed: expected finite values, got NaN or infinity in 1 of 2"):
            values()
    else:
        np.testing.assert_equal(values(), [1.0, {"nan": math.nan}.get(str(last), last)])

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from deleatur.errors import ModelError
from deleatur.maths.finite import require_finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_refused_naming_the_subject(value: float, dtype: torch.dtype) -> None:
    values = torch.zeros(2, 3, dtype=dtype)
    assert require_finite(values, "latents") is values
    values[1, 2] = value
    with pytest.raises(ModelError, match="latents: expected finite values, got NaN or infinity in 1 of 6") as error:
        require_finite(values, "latents")
    assert error.value.exit_code == 4


def test_arrays_and_integers_pass() -> None:
    assert require_finite(np.zeros((0, 2), np.float32), "scores").shape == (0, 2)
    assert require_finite(torch.arange(3), "counts").tolist() == [0, 1, 2]
    with pytest.raises(ModelError, match="scores"):
        require_finite(np.array([np.nan], np.float32), "scores")

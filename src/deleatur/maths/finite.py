"""The check that refuses NaN and infinity where they appear."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deleatur.errors import ModelError

Values = TypeVar("Values", Tensor, NDArray[np.float32], NDArray[np.float64])


def require_finite(values: Values, subject: str) -> Values:
    """The values. Raises ModelError, naming the subject, when one of them is NaN or infinite."""
    finite = torch.as_tensor(values).isfinite()
    if not finite.all():
        raise ModelError(
            f"{subject}: expected finite values, got NaN or infinity in {int((~finite).sum())} of {finite.numel()}",
            hint="replace the file that it comes from or, with base.dtype bfloat16, set float32; then: deleatur check",
        )
    return values

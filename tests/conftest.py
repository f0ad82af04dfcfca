"""Every test runs on one thread: small networks are slower on two, and sums do not change their order."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import tiny
import torch

from deleatur.diffusion.load import Model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model() -> Model:
    """The tiny pipeline; frozen, so that all tests may share it."""
    return tiny.model()

"""Counts network calls with PyTorch hooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn.modules.module import register_module_forward_hook

UNET = "UNet2DConditionModel"
JUDGE = "ConvNextForImageClassification"
VISION = "CLIPVisionModel"
TEXT = "CLIPTextModel"


@contextmanager
def calls(on_call: Callable[[Counter[str]], None] = lambda counts: None) -> Iterator[Counter[str]]:
    """Counts forward calls of all modules, by the name of their class."""
    counts: Counter[str] = Counter()

    def count(module: Any, args: Any, output: Any) -> None:
        counts[type(module).__name__] += 1
        on_call(counts)

    handle = register_module_forward_hook(count)
    try:
        yield counts
    finally:
        handle.remove()


@contextmanager
def rows() -> Iterator[Counter[str]]:
    """Counts latents that pass through a UNet: "forward" without gradient, "backward" with; beside them the most in
    one call, "max_forward_batch" and "max_backward_batch".
    """
    counts: Counter[str] = Counter()

    def count(module: Any, args: Any, output: Any) -> None:
        if type(module).__name__ == UNET:
            n = len(args[0])
            kind = "backward" if output.sample.requires_grad else "forward"
            counts[kind] += n
            counts[f"max_{kind}_batch"] = max(counts[f"max_{kind}_batch"], n)

    handle = register_module_forward_hook(count)
    try:
        yield counts
    finally:
        handle.remove()

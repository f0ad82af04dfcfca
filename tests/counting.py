"""Network calls as torch itself sees them."""

from __future__ import annotations

import os
import signal
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
    """Inside, every forward call of every module counts, by the name of its class."""
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
    """Inside, every latent that goes through a UNet counts: "forward" without gradient, "backward" with; beside them,
    the most that went through at once, as "wide" and "deep".
    """
    counts: Counter[str] = Counter()

    def count(module: Any, args: Any, output: Any) -> None:
        if type(module).__name__ == UNET:
            n = len(args[0])
            total, most = ("backward", "deep") if output.sample.requires_grad else ("forward", "wide")
            counts[total] += n
            counts[most] = max(counts[most], n)

    handle = register_module_forward_hook(count)
    try:
        yield counts
    finally:
        handle.remove()


def killed(work: Callable[[], object], when: Callable[[], object] = lambda: None) -> bool:
    """Whether a process of its own was killed while it worked; `when` runs in it before, and arranges that."""
    child = os.fork()
    if child == 0:
        try:
            when()
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)

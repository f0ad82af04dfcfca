"""What a run asks of a machine, known before it begins: network calls, operations, trained numbers, memory.

A row is one latent that goes through the UNet once. E: rows without gradient; B: rows with gradient, there and back.

Methods say how many rows they take, `Work`. What a row costs is found by sending one through the network's shape alone:
tensors without memory, whose operations and sizes are counted as torch lays them out on a CPU.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from deleatur.diffusion.architecture import Architecture
from deleatur.diffusion.model import DTYPES, load_unet, resolve_device
from deleatur.training.parameters import Selector, select


@dataclass(frozen=True)
class Work:
    """What a method asks of the networks from its first step to its last possible one."""

    forward: float = 0.0
    """E. Where chance decides how many there are, their mean."""
    backward: float = 0.0
    """B."""
    wide: int = 0
    """Rows of the largest call without gradient."""
    deep: int = 0
    """Rows of the largest call with gradient."""
    train: Selector | None = None
    """What the gradient is taken of, and what may change. None: of what the network is asked."""
    held: int = 0
    """Bytes that are held for each number that may change."""
    latents: int = 0
    """Latents that are held."""
    decoded: int = 0
    """Pictures that are made of latents at once."""
    looks: int = 0
    """How often pictures are sampled and rated on the way. What that takes is no part of this."""
    found: int = 0
    """Soft prompts that come of it, at most."""

    def __add__(self, other: Work) -> Work:
        """One after the other."""
        return Work(
            self.forward + other.forward,
            self.backward + other.backward,
            max(self.wide, other.wide),
            max(self.deep, other.deep),
            self.train or other.train,
            max(self.held, other.held),
            max(self.latents, other.latents),
            max(self.decoded, other.decoded),
            self.looks + other.looks,
            self.found + other.found,
        )


def drawn(pictures: int, steps: int, predictions: int, batch: int) -> Work:
    """Pictures from the sampler; each network call has `batch` of them, the last one too."""
    filled = -(-pictures // batch) * batch
    return Work(forward=filled * steps * predictions, wide=batch * predictions, decoded=batch)


@dataclass(frozen=True)
class Cost:
    work: Work
    trained: int
    """Numbers that may change."""
    operations: float
    """Floating-point ones, of the UNet's matrix products and convolutions."""
    memory: int
    """Bytes at the highest point: networks, what is held, activations. Python and the libraries are not in it."""


def cost(work: Work, of: Architecture, dtype: str = "float32") -> Cost:
    kind = DTYPES[dtype]
    chosen = select(of.unet, work.train) if work.train else {}
    row, picture, back = _passed(of.unet, of.unet_input_shapes(1), kind), _Passed(0, 0), _Passed(0, 0)
    if work.decoded:
        picture = _passed(of.decoder, ((1, *of.latent_shape),), kind)
    if work.deep:
        back = _passed(of.unet, of.unet_input_shapes(work.deep), kind, gradient=True, chosen=frozenset(chosen))
    trained = sum(p.numel() for p in chosen.values())
    # In another precision than fp32, which weights are trained in, the network reads copies of student and teacher.
    copies = 2 * kind.itemsize if work.deep and kind != torch.float32 else 0
    # Without gradient, memory grows with the rows; with it, gradients of the weights are the same for one as for many.
    at_once = max(work.wide * row.memory, work.decoded * picture.memory, back.memory)
    kept = (of.num_parameters + work.latents * torch.Size(of.latent_shape).numel()) * kind.itemsize
    operations = work.forward * row.operations + work.backward * back.operations / max(work.deep, 1)
    return Cost(work, trained, operations, kept + trained * (work.held + copies) + at_once)


def speed(folder: Path, of: Architecture, dtype: str, device: str) -> float:
    """Operations per second of one call of the UNet in a pipeline's folder, of two rows: a guided step of one picture.
    A call before it sets things up and does not count.
    """
    place, kind = resolve_device(device), DTYPES[dtype]
    unet = load_unet(str(folder), kind, place)
    z, c = (torch.zeros(2, *size, device=place, dtype=kind) for size in (of.latent_shape, of.text_states_shape))

    def seconds() -> float:
        began = time.perf_counter()
        unet(z, 500, c).sample.sum().item()  # which waits for the device
        return time.perf_counter() - began

    with torch.no_grad():
        seconds()
        return 2 * _passed(of.unet, of.unet_input_shapes(1), kind).operations / seconds()


@dataclass(frozen=True)
class _Passed:
    operations: float
    memory: int
    """Most bytes at a time beside the weights."""


@cache
def _passed(
    net: nn.Module,
    sizes: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    *,
    gradient: bool = False,
    chosen: frozenset[str] = frozenset(),
) -> _Passed:
    """Arguments of these sizes through a network; with gradient also back, to the chosen weights or, where there are
    none, to the last argument.
    """
    with FakeTensorMode():
        weights = {n: torch.empty(p.shape, dtype=dtype) for n, p in net.named_parameters()}
        given = [torch.empty(size, dtype=dtype) for size in sizes]
        for tensor in [weights[n] for n in chosen] or given[-1:]:
            tensor.requires_grad_(gradient)
        with FlopCounterMode(display=False) as counted, _Live(weights.values()) as live:
            with torch.set_grad_enabled(gradient):
                said = functional_call(net, weights, tuple(given))[0]
            if gradient:
                said.float().square().mean().backward()
    return _Passed(counted.get_total_flops(), live.peak)


class _Live(TorchDispatchMode):
    """Counts the bytes of what operations make, until nobody holds it any more. `apart` is not counted."""

    def __init__(self, apart: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {t.untyped_storage()._cdata for t in apart}
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return out

    def _hold(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:  # a view, or written in place
            return
        self._known.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size

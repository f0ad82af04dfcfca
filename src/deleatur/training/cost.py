"""The compute that a run takes, estimated before it begins: network calls, FLOP, trainable parameters, memory.

A row is one latent that passes through the UNet once. E: rows without gradient; B: rows with gradient, there and back.

Methods state their rows as a `Workload`. The cost of a row comes from a pass through the network's shapes alone:
fake tensors, which take no memory, and whose operations and sizes are counted as PyTorch lays them out on a CPU.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
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

MIN_REPEATS, STABLE_REPEATS = 3, 10
"""Timed calls before time may run out, and before they may count as stable."""
STABLE_SPREAD = 0.1
"""Distance of the 10th to the 90th percentile, relative to the median, up to which durations count as stable."""
MEASURING_SECONDS = 1.0


@dataclass(frozen=True)
class Workload:
    """Network calls of a method from its first step to its last possible one."""

    forward: float = 0.0
    """E; the mean where it is random."""
    backward: float = 0.0
    """B."""
    max_forward_batch: int = 0
    """Rows of the largest call without gradient."""
    max_backward_batch: int = 0
    """Rows of the largest call with gradient."""
    trainable: Selector | None = None
    """Which parameters the gradient is of, and the method may change. None: the gradient is of the network's input."""
    bytes_per_parameter: int = 0
    """Memory of copies and optimizer state for each trainable parameter."""
    stored_latents: int = 0
    """Latents that stay in memory."""
    decode_batch: int = 0
    """Images that the VAE decodes at a time."""
    evaluations: int = 0
    """Evaluations of sampled images during the run; their cost is not included."""
    num_tokens: int = 0
    """Most soft tokens that result."""

    def __add__(self, other: Workload) -> Workload:
        """One workload after the other: sums of calls, maxima of memory."""
        return Workload(
            self.forward + other.forward,
            self.backward + other.backward,
            max(self.max_forward_batch, other.max_forward_batch),
            max(self.max_backward_batch, other.max_backward_batch),
            self.trainable or other.trainable,
            max(self.bytes_per_parameter, other.bytes_per_parameter),
            max(self.stored_latents, other.stored_latents),
            max(self.decode_batch, other.decode_batch),
            self.evaluations + other.evaluations,
            self.num_tokens + other.num_tokens,
        )


def sampling_workload(num_images: int, steps: int, predictions: int, batch_size: int) -> Workload:
    """Sampling images with so many predictions per step. The last batch is padded to the batch size."""
    padded = -(-num_images // batch_size) * batch_size
    return Workload(
        forward=padded * steps * predictions, max_forward_batch=batch_size * predictions, decode_batch=batch_size
    )


@dataclass(frozen=True)
class CostEstimate:
    """What a workload takes on a network."""

    workload: Workload
    trainable_parameters: int
    flops: float
    """Floating-point operations of the UNet's matrix products and convolutions."""
    peak_memory: int
    """Bytes of networks, copies, optimizer state and activations, without Python and the libraries."""


def estimate_cost(workload: Workload, architecture: Architecture, dtype: str = "float32") -> CostEstimate:
    """The cost of a workload on a network of this architecture and precision."""
    precision = DTYPES[dtype]
    parameters = select(architecture.unet, workload.trainable) if workload.trainable else {}
    row = _pass_cost(architecture.unet, architecture.unet_input_shapes(1), precision)
    image, batch = _PassCost(0, 0), _PassCost(0, 0)
    if workload.decode_batch:
        image = _pass_cost(architecture.decoder, ((1, *architecture.latent_shape),), precision)
    if workload.max_backward_batch:
        shapes = architecture.unet_input_shapes(workload.max_backward_batch)
        batch = _pass_cost(architecture.unet, shapes, precision, gradient=True, trainable=frozenset(parameters))
    trainable = sum(p.numel() for p in parameters.values())
    # Weights train in fp32: in another precision the network reads cast copies of student and teacher.
    cast_copies = 2 * precision.itemsize if workload.max_backward_batch and precision != torch.float32 else 0
    # Without gradient, memory grows with the rows; the gradients of the weights have the same size for every batch.
    activations = max(workload.max_forward_batch * row.memory, workload.decode_batch * image.memory, batch.memory)
    latents = workload.stored_latents * torch.Size(architecture.latent_shape).numel() * torch.float32.itemsize
    resident = architecture.num_parameters * precision.itemsize + latents
    resident += trainable * (workload.bytes_per_parameter + cast_copies)
    flops = workload.forward * row.flops + workload.backward * batch.flops / max(workload.max_backward_batch, 1)
    return CostEstimate(workload, trainable, flops, resident + activations)


@dataclass(frozen=True)
class Speed:
    """FLOP per second over repeated calls. Their spread shows how far other work on the machine disturbs them."""

    median: float
    low: float
    """10th percentile."""
    high: float
    """90th percentile."""


def measure_speed(folder: Path, architecture: Architecture, dtype: str, device: str) -> Speed:
    """Speed of the UNet in a pipeline's folder, measured on guided steps of one image (two rows)."""
    place, precision = resolve_device(device), DTYPES[dtype]
    unet = load_unet(str(folder), precision, place)
    z, c = (
        torch.zeros(2, *shape, device=place, dtype=precision)
        for shape in (architecture.latent_shape, architecture.text_states_shape)
    )

    def seconds() -> float:
        began = time.perf_counter()
        unet(z, 500, c).sample.sum().item()  # item() waits for the device
        return time.perf_counter() - began

    flops = 2 * _pass_cost(architecture.unet, architecture.unet_input_shapes(1), precision).flops
    with torch.no_grad():
        seconds()  # warm-up: allocations and kernel selection
        durations = repeat_until_stable(seconds)
    median, slow, fast = np.quantile(durations, [0.5, 0.9, 0.1])
    return Speed(flops / median, flops / slow, flops / fast)


def repeat_until_stable(measure: Callable[[], float]) -> list[float]:
    """Durations in seconds of repeated measurements: until they agree or, once there are a few, time is up."""
    durations: list[float] = []
    while len(durations) < MIN_REPEATS or sum(durations) < MEASURING_SECONDS:
        durations.append(measure())
        if len(durations) >= STABLE_REPEATS:
            median, slow, fast = np.quantile(durations, [0.5, 0.9, 0.1])
            if slow - fast <= STABLE_SPREAD * median:
                break
    return durations


@dataclass(frozen=True)
class _PassCost:
    flops: float
    memory: int
    """Most bytes at a time beside the weights."""


@cache
def _pass_cost(
    net: nn.Module,
    shapes: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    *,
    gradient: bool = False,
    trainable: frozenset[str] = frozenset(),
) -> _PassCost:
    """Cost of one pass with arguments of these shapes; with gradient also of the backward pass, to the trainable
    parameters or, without any, to the last argument.
    """
    with FakeTensorMode():
        weights = {n: torch.empty(p.shape, dtype=dtype) for n, p in net.named_parameters()}
        arguments = [torch.empty(shape, dtype=dtype) for shape in shapes]
        for tensor in [weights[n] for n in trainable] or arguments[-1:]:
            tensor.requires_grad_(gradient)
        with FlopCounterMode(display=False) as counter, _MemoryTracker(weights.values()) as tracker:
            with torch.set_grad_enabled(gradient):
                output = functional_call(net, weights, tuple(arguments))[0]
            if gradient:
                output.float().square().mean().backward()
    return _PassCost(counter.get_total_flops(), tracker.peak)


class _MemoryTracker(TorchDispatchMode):
    """Counts the bytes of tensors from their creation until they are garbage; those of `excluded` do not count."""

    def __init__(self, excluded: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {t.untyped_storage()._cdata for t in excluded}
        self._current = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:  # a view, or written in place
            return
        self._known.add(key)
        self._current += size
        self.peak = max(self.peak, self._current)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._current -= size

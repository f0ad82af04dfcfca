"""Application of a Delta to a model: as separate weights for sampling, in place for export."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.errors import ModelError
from deleatur.maths.finite import require_finite
from deleatur.records.model import Delta


def edited_weights(model: Model, delta: Delta) -> dict[str, Tensor]:
    """base + difference, in the model's precision, for `predict` and `sample`.

    Raises ModelError if the delta has another base, names a tensor that the base lacks, or is not finite.
    """
    if delta.base != model.unet_digest:
        raise ModelError(
            f"the delta has base {delta.base[:12]}…, this base is {model.unet_digest[:12]}…",
            hint="dvc repro erase",
        )
    base = dict(model.unet.named_parameters())
    if missing := set(delta.tensors) - set(base):
        raise ModelError(
            f"the delta names tensors that this UNet lacks: {', '.join(sorted(missing)[:3])}", hint="dvc repro erase"
        )
    differences = {n: require_finite(d, f"the delta of {delta.method}, {n}") for n, d in delta.tensors.items()}
    return {n: (base[n].float() + d.to(model.device)).to(base[n].dtype) for n, d in differences.items()}


def rounding_loss(model: Model, delta: Delta) -> float:
    """‖applied difference − difference‖ / ‖difference‖: the share that rounding to the model's precision loses.

    A parameter in bfloat16 has eight significant bits: a difference below 1/512 of it rounds to nothing.
    """
    base, total, lost = dict(model.unet.named_parameters()), 0.0, 0.0
    for name, weight in edited_weights(model, delta).items():
        difference = delta.tensors[name].to(model.device)
        total += float(difference.square().sum())
        lost += float((weight.float() - base[name].float() - difference).square().sum())
    return math.sqrt(lost / total) if total else 0.0


def weight_difference(model: Model, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """weights − base, in fp32 on the CPU."""
    base = dict(model.unet.named_parameters())
    return {n: (w.detach().float() - base[n].float()).cpu() for n, w in weights.items()}


@contextmanager
def applied(model: Model, delta: Delta) -> Iterator[Model]:
    """Inside, the model's UNet has the delta applied; afterwards, every bit is restored."""
    parameters = dict(model.unet.named_parameters())
    edited = edited_weights(model, delta)
    original = {n: parameters[n].detach().clone() for n in edited}
    try:
        _copy(edited, parameters)
        yield model
    finally:
        _copy(original, parameters)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, value in source.items():
        target[name].copy_(value)


def add_deltas(first: Delta, second: Delta) -> Delta:
    """The sum of two deltas. Raises ModelError if their bases differ, or when one of them samples in one step."""
    if (first.one_step, second.one_step) != (None, None):
        raise ModelError("a one-step sampler's delta cannot be added to another delta")
    if first.base != second.base:
        raise ModelError(f"deltas of different bases cannot be added: {first.base[:12]}… and {second.base[:12]}…")
    names = {*first.tensors, *second.tensors}
    zero = torch.zeros(())
    tensors = {n: first.tensors.get(n, zero) + second.tensors.get(n, zero) for n in names}
    return Delta(
        tensors,
        first.base,
        f"{first.method}+{second.method}",
        {"first": dict(first.settings), "second": dict(second.settings)},
        first.concepts + second.concepts,
    )

"""A Delta on a model: beside it for sampling, in it for export. Taking it off restores every bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from deleatur.diffusion.model import Model
from deleatur.errors import ModelError
from deleatur.records.model import Delta


def weights_of(model: Model, delta: Delta) -> dict[str, Tensor]:
    """base + difference, in the model's precision, for `predict` and `sample`.

    Raises ModelError when the difference was made for another base, or names a tensor that the base lacks.
    """
    if delta.base != model.digest:
        raise ModelError(
            f"the delta was made for base {delta.base[:12]}…, this base is {model.digest[:12]}…",
            hint="dvc repro erase",
        )
    own = dict(model.unet.named_parameters())
    if missing := set(delta.tensors) - set(own):
        raise ModelError(f"the delta names tensors that this UNet lacks: {', '.join(sorted(missing)[:3])}")
    return {n: (own[n].float() + d.to(model.device)).to(own[n].dtype) for n, d in delta.tensors.items()}


def difference(model: Model, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """weights − base, in fp32 on the CPU."""
    own = dict(model.unet.named_parameters())
    return {n: (w.detach().float() - own[n].float()).cpu() for n, w in weights.items()}


@contextmanager
def applied(model: Model, delta: Delta) -> Iterator[Model]:
    """Inside, the model's own UNet carries the delta; outside, every bit is as before."""
    own = dict(model.unet.named_parameters())
    new = weights_of(model, delta)
    kept = {n: own[n].detach().clone() for n in new}
    try:
        _copy(own, new)
        yield model
    finally:
        _copy(own, kept)


@torch.no_grad()
def _copy(into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        into[name].copy_(value)


def add(first: Delta, second: Delta) -> Delta:
    """Both erasures in one. Refused when the two were not made for the same base."""
    if (first.one_step, second.one_step) != (None, None):
        raise ModelError("weights that draw in one step do not add up with others")
    if first.base != second.base:
        raise ModelError(f"deltas of different bases do not add: {first.base[:12]}… and {second.base[:12]}…")
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

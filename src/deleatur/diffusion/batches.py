"""Batches of constant shape, so that the output for an item does not depend on the rest of its batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def padded_batches(items: Sequence[T], size: int) -> Iterator[tuple[list[T], int]]:
    """Batches of exactly `size` items, each with its number of valid ones; the last item pads the last batch.

    Libraries select kernels by shape, and with them the order of summation: smaller batches may differ in the last
    bits.
    """
    for i in range(0, len(items), size):
        batch = list(items[i : i + size])
        yield batch + batch[-1:] * (size - len(batch)), len(batch)

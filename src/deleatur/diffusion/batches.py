"""Network calls of one shape: what a network says of an item does not depend on the company it is in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def full(items: Sequence[T], size: int) -> Iterator[tuple[list[T], int]]:
    """Batches of exactly `size`, the last one filled up with its last item, and how many of each count.

    Kernels are picked by shape, and with them the order of sums: a call with fewer rows may differ in the last bits.
    """
    for i in range(0, len(items), size):
        batch = list(items[i : i + size])
        yield batch + batch[-1:] * (size - len(batch)), len(batch)

"""Representative subsets. Every k-th item of a list is no such subset: lists repeat, with a period that k may share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

T = TypeVar("T")


def stratified(items: Sequence[T], n: int, name: Callable[[T], str], *strata: Callable[[T], Any]) -> list[T]:
    """n items with different names, in their order; all of them where there are fewer.

    Strata are nested: the n are spread over the values of the first, those of each over the values of the second, and
    so on, as evenly as their sizes allow. Within a stratum they are chosen by the hash of their name, so that the
    subset depends on the items and not on their order.
    """
    distinct = {name(item): item for item in reversed(items)}
    selected = {name(item) for item in _interleaved(list(distinct.values()), name, strata)[:n]}
    return [item for key, item in reversed(distinct.items()) if key in selected]


def _interleaved(items: Sequence[T], name: Callable[[T], str], strata: Sequence[Callable[[T], Any]]) -> list[T]:
    """One item of each stratum in turn."""
    if not strata:
        return sorted(items, key=lambda item: _hash(name(item)))
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(strata[0](item), []).append(item)
    queues = [_interleaved(groups[value], name, strata[1:]) for value in sorted(groups, key=lambda v: _hash(str(v)))]
    absent: Any = object()
    rounds = zip_longest(*queues, fillvalue=absent)
    return [item for turn in rounds for item in turn if item is not absent]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()

"""Subsets are distinct and spread over strata, whatever the period of the list."""

from __future__ import annotations

from collections import Counter

import pytest

from deleatur.maths.subsets import stratified

Item = tuple[str, str, str]
"""Role, label, text."""


def subset(items: list[Item], n: int) -> list[Item]:
    return stratified(items, n, lambda i: i[2], lambda i: i[0], lambda i: i[1])


KEEP: list[Item] = [("keep", f"k{i // 2}", f"keep {i}") for i in range(94)]
NEIGHBOURS: list[Item] = [("neighbour", f"n{i // 2}", f"neighbour {i}") for i in range(18)]


@pytest.mark.parametrize("repeats", [1, 5])
@pytest.mark.parametrize("n", [9, 18, 20, 32])
def test_both_roles_and_as_many_labels_as_possible(repeats: int, n: int) -> None:
    items = KEEP + NEIGHBOURS * repeats
    selected = subset(items, n)
    roles, labels = Counter(role for role, _, _ in selected), Counter(label for _, label, _ in selected)
    assert len(set(selected)) == n
    assert abs(roles["keep"] - roles["neighbour"]) <= 1
    assert len([label for label in labels if label.startswith("n")]) == min(roles["neighbour"], 9)
    assert max(n for label, n in labels.items() if label.startswith("k")) == 1
    every = list(items[:: max(1, len(items) // 20)])[:20]
    assert repeats == 1 or len(set(every)) < 20, "as every k-th item of the repeated list would have been"


def test_small_strata_give_all_they_have_and_the_order_is_kept() -> None:
    items = KEEP[:30] + NEIGHBOURS[:3]
    selected = subset(items, 20)
    assert selected == [item for item in items if item in selected]
    assert set(NEIGHBOURS[:3]) <= set(selected)
    assert subset(items, 100) == items
    assert subset([], 5) == []


def test_the_subset_does_not_depend_on_the_order_of_the_list() -> None:
    items = KEEP + NEIGHBOURS
    assert set(subset(items, 20)) == set(subset(items[::-1], 20))

from __future__ import annotations

from deleatur.evaluation.scores import report_slices
from deleatur.records.sampling import Prompt

WEAPON = [Prompt("1", "a gun", "concept", "", "weapon"), Prompt("2", "weapon", "word", "", "weapon")]
CALM = [Prompt("3", "a cat", "unseen", ""), Prompt("4", "a hammer", "neighbour", "")]
VICE = [Prompt("5", "a beer", "concept", "", "vice")]


def test_slices_are_roles_and_with_several_concepts_also_concepts_of_a_role() -> None:
    assert {*report_slices([*WEAPON, *CALM])} == {"concept", "word", "unseen", "neighbour"}
    both = report_slices([*WEAPON, *CALM, *VICE])
    assert {*both} == {"concept", "word", "unseen", "neighbour", "concept/weapon", "concept/vice"}
    assert both["concept"].tolist() == [True, False, False, False, True]
    assert both["concept/vice"].tolist() == [False, False, False, False, True]

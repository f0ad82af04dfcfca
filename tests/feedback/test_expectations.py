"""Planted violations are caught, each by its rule, and the rows are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from conftest import Make, digest

from deleatur.feedback import expectations
from deleatur.feedback.expectations import Checked

Table = Callable[..., pd.DataFrame]
AT_HAND = [digest(f"p{i}") for i in range(5)]


@pytest.fixture
def check(table: Table, tmp_path: Path) -> Callable[..., Checked]:
    return lambda *found: expectations.validate(
        table(*found), {"weapon": "binary", "style": "rank"}, AT_HAND, tmp_path / "docs"
    )


PLANTED = {
    "event id given": {"event_id": ""},
    "concept": {"concept": "wepon"},
    "kind": {"concept": "style"},
    "answer": {"answer": "ranked"},
    "items": {"items": (digest("p0"), digest("p1"))},
    "digest": {"items": ("0" * 63,)},
    "ranks": {"ranks": (1,)},
    "picture": {"items": (digest("gone"),)},
    "time": {"created_at": "yesterday"},
    "seconds": {"seconds_spent": -1.0},
    "rater": {"rater": "Jane Doe"},
    "source": {"source": ""},
    "model_version": {"model_version": ""},
    "consent_version": {"consent_version": ""},
}


def test_each_planted_violation_is_named(event: Make, check: Callable[..., Checked], tmp_path: Path) -> None:
    """All of them at once, among good rows: a rule that is broken often must not hide another."""
    planted = [event(**{"event_id": f"bad {rule}", **changes}) for rule, changes in PLANTED.items()]
    checked = check(event("good 1"), *planted, event("good 2", kind="rank"), event("twice"), event("twice"))
    rules = {rule["rule"]: rule for rule in checked.summary["rules"]}
    assert set(rules) == {"event id", *PLANTED}
    assert rules["event id"]["event_ids"] == ["twice", "twice"]
    for place, (rule, changes) in enumerate(PLANTED.items(), 1):
        assert changes.get("event_id", f"bad {rule}") in rules[rule]["event_ids"]
        assert place in {v.place for v in checked.violations if v.rule == rule}
    assert {v.place for v in checked.violations}.isdisjoint({0, len(PLANTED) + 1})
    assert all(v.expected and v.remedy for v in checked.violations)
    assert not checked.summary["success"]
    assert "Jane" not in "".join(v.got for v in checked.violations)
    assert (tmp_path / "docs" / "index.html").is_file()


RANKS = {
    "five": (True, (5, 4, 3, 2, 1)),
    "some X": (True, (1, None, 2, None, None)),
    "all X": (True, (None,) * 5),
    "gaps": (True, (1, None, 5, None, None)),
    "twice": (False, (1, 1, 2, 3, 4)),
    "too high": (False, (1, 2, 3, 4, 6)),
    "zero": (False, (0, 1, 2, 3, 4)),
    "too few": (False, (1, 2, 3, 4)),
    "none": (False, None),
}


def test_ranks_are_one_to_m_and_only_x_repeats(event: Make, check: Callable[..., Checked]) -> None:
    checked = check(*(event(name, kind="rank", ranks=ranks) for name, (_, ranks) in RANKS.items()))
    [rule] = [rule for rule in checked.summary["rules"] if rule["rule"] == "ranks"]
    assert rule["event_ids"] == [name for name, (good, _) in RANKS.items() if not good]


def test_a_withdrawal_counts_whatever_became_of_the_picture(event: Make, check: Callable[..., Checked]) -> None:
    gone = event("w", answer="withdrawn", replaces="e1", items=(digest("gone"),))
    assert check(gone).summary["success"]
    assert check(event("w", answer="withdrawn", replaces=None)).violations[0].rule == "answer"


def test_an_empty_table_breaks_no_rule(check: Callable[..., Checked]) -> None:
    assert check().summary["success"]

"""Each violation is reported by its rule, with the violating rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from conftest import EventFactory, digest

from deleatur.feedback import expectations
from deleatur.feedback.expectations import ValidationResult

Table = Callable[..., pd.DataFrame]
AVAILABLE = [digest(f"p{i}") for i in range(5)]


@pytest.fixture
def check(table: Table, tmp_path: Path) -> Callable[..., ValidationResult]:
    return lambda *feedback: expectations.validate(
        table(*feedback), {"weapon": "binary", "style": "rank"}, AVAILABLE, tmp_path / "docs"
    )


VIOLATIONS = {
    "event id given": {"event_id": ""},
    "concept": {"concept": "wepon"},
    "kind": {"concept": "style"},
    "answer": {"answer": "ranked"},
    "items": {"items": (digest("p0"), digest("p1"))},
    "digest": {"items": ("0" * 63,)},
    "ranks": {"ranks": (1,)},
    "image": {"items": (digest("gone"),)},
    "time": {"created_at": "yesterday"},
    "seconds": {"seconds_spent": -1.0},
    "rater": {"rater": "Jane Doe"},
    "source": {"source": ""},
    "model_version": {"model_version": ""},
    "consent_version": {"consent_version": ""},
}


def test_each_violation_is_reported_by_its_rule(
    event: EventFactory, check: Callable[..., ValidationResult], tmp_path: Path
) -> None:
    """All of them in one table among valid rows: many violations of one rule must not hide another."""
    bad_events = [event(**{"event_id": f"bad {rule}", **changes}) for rule, changes in VIOLATIONS.items()]
    checked = check(event("good 1"), *bad_events, event("good 2", kind="rank"), event("twice"), event("twice"))
    rules = {rule["rule"]: rule for rule in checked.summary["rules"]}
    assert set(rules) == {"event id", *VIOLATIONS}
    assert rules["event id"]["event_ids"] == ["twice", "twice"]
    for position, (rule, changes) in enumerate(VIOLATIONS.items(), 1):
        assert changes.get("event_id", f"bad {rule}") in rules[rule]["event_ids"]
        assert position in {v.position for v in checked.violations if v.rule == rule}
    assert {v.position for v in checked.violations}.isdisjoint({0, len(VIOLATIONS) + 1})
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


def test_ranks_are_distinct_numbers_up_to_m_or_x(event: EventFactory, check: Callable[..., ValidationResult]) -> None:
    checked = check(*(event(name, kind="rank", ranks=ranks) for name, (_, ranks) in RANKS.items()))
    [rule] = [rule for rule in checked.summary["rules"] if rule["rule"] == "ranks"]
    assert rule["event_ids"] == [name for name, (is_valid, _) in RANKS.items() if not is_valid]


def test_withdrawal_is_valid_without_its_image(event: EventFactory, check: Callable[..., ValidationResult]) -> None:
    withdrawal = event("w", answer="withdrawn", replaces="e1", items=(digest("gone"),))
    assert check(withdrawal).summary["success"]
    assert check(event("w", answer="withdrawn", replaces=None)).violations[0].rule == "answer"


def test_empty_table_is_valid(check: Callable[..., ValidationResult]) -> None:
    assert check().summary["success"]

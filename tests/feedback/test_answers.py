"""Corrections replace, withdrawals always remove, and the latest answer of a rater counts."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from conftest import EventFactory, digest

from deleatur.feedback import events
from deleatur.feedback.answers import ResolvedEvents, resolve
from deleatur.feedback.events import EventRow
from deleatur.records.feedback import FeedbackEvent


def rows(*feedback: FeedbackEvent) -> list[EventRow]:
    return [EventRow("a.jsonl", i, e) for i, e in enumerate(feedback, 1)]


def resolved(*feedback: FeedbackEvent, quarantined_ids: Sequence[str] = ()) -> ResolvedEvents:
    return resolve(rows(*feedback), (), quarantined_ids)


def in_effect(*feedback: FeedbackEvent) -> list[str]:
    return [row.event.event_id for row in resolved(*feedback).answers]


def test_correction_replaces_and_withdrawal_removes(event: EventFactory) -> None:
    feedback = (
        event("e1"),
        event("e2", rater="r2"),
        event("e3", rater="r3"),
        event("c1", answer="no", replaces="e1"),
        event("w2", rater="r2", answer="withdrawn", replaces="e2", items=()),
        event("c2", replaces="c1"),
    )
    result = resolved(*feedback)
    assert result.events == rows(*feedback), "replaced and withdrawn events stay in the table"
    assert result.rejected == []
    assert in_effect(*feedback) == ["e3", "c2"]


def test_corrections_are_independent_of_file_order(event: EventFactory) -> None:
    new = event("c1", answer="no", replaces="e1", created_at="2024-05-01T11:00:00+00:00")
    assert in_effect(new, event("e1")) == ["c1"]


def test_latest_answer_of_a_rater_counts(event: EventFactory) -> None:
    first, again = event("e1", created_at="2024-05-02T00:00:00Z"), event("e2", answer="no")
    assert in_effect(first, again, event("e3", rater="r2")) == ["e1", "e3"]


def test_the_order_of_a_screens_images_does_not_matter(event: EventFactory) -> None:
    shuffled = tuple(digest(f"p{i}") for i in (3, 1, 0, 4, 2))
    first, again = event("e1", kind="rank"), event("e2", kind="rank", items=shuffled)
    assert in_effect(first, again) == ["e2"], "the same question, answered again"
    correction = resolved(first, event("c1", kind="rank", items=shuffled, replaces="e1"))
    assert [row.event.event_id for row in correction.answers] == ["c1"]
    assert correction.rejected == []


INVALID = {
    "unknown event": {"replaces": "e0"},
    "itself": {"replaces": "c1"},
    "another rater's": {"replaces": "e1", "rater": "r2"},
    "another concept's": {"replaces": "e1", "concept": "style"},
    "another image's": {"replaces": "e1", "items": (digest("p9"),)},
    "a newer one": {"replaces": "e1", "created_at": "2024-04-30T23:59:59Z"},
}


@pytest.mark.parametrize("changes", INVALID.values(), ids=INVALID.keys())
def test_invalid_correction_is_quarantined(event: EventFactory, changes: dict[str, object]) -> None:
    feedback = event("e1"), event("c1", **changes)
    assert in_effect(*feedback) == ["e1"]
    [quarantined] = resolved(*feedback).rejected
    assert (quarantined.line, quarantined.rule, quarantined.event_id) == (2, "replaces", "c1")
    assert quarantined.remedy


def test_quarantined_event_can_be_replaced(event: EventFactory) -> None:
    result = resolved(event("c1", replaces="broken"), quarantined_ids=["broken"])
    assert (result.answers, result.rejected) == (rows(event("c1", replaces="broken")), [])


WITHDRAWALS = {
    "clock three seconds behind": {"created_at": "2024-05-01T09:59:57Z"},
    "same second": {"created_at": "2024-05-01T10:00:00Z"},
    "a year behind": {"created_at": "2023-05-01T10:00:00Z"},
    "far in the future": {"created_at": "9999-12-31T23:59:59Z"},
    "no time": {"created_at": "yesterday"},
    "negative seconds": {"seconds_spent": -1.0},
    "another concept": {"concept": "wepon"},
    "another kind": {"kind": "rank"},
    "other items": {"items": (digest("gone"), "x")},
    "no consent version, no source": {"consent_version": "", "source": "", "model_version": ""},
}
LINES: dict[str, dict[str, object]] = {
    **{name: {k: list(v) if isinstance(v, tuple) else v for k, v in w.items()} for name, w in WITHDRAWALS.items()},
    "text for a number": {"seed": "7", "severity": "high"},
    "missing fields": {name: None for name in ("prompt", "seed", "items", "created_at", "source", "concept")},
    "unknown kind and field": {"kind": "stars", "mood": "bad"},
    "number too large": {"seed": 10**30},
    "half a surrogate": {"prompt": "\ud800"},
    "blank id": {"event_id": " "},
    "the answer's own id": {"event_id": "e1", "replaces": None},
}


@pytest.mark.parametrize("first", [True, False], ids=["before the answer", "after the answer"])
@pytest.mark.parametrize("changes", LINES.values(), ids=LINES.keys())
def test_withdrawal_counts_whatever_its_order_and_other_fields(
    event: EventFactory, changes: dict[str, object], first: bool
) -> None:
    answer, other = (events.to_json(e).encode() for e in (event("e1"), event("e2", rater="r2")))
    values = {**vars(event("w")), "answer": "withdrawn", "replaces": "e1", **changes}
    withdrawal = json.dumps({k: v for k, v in values.items() if v is not None}).encode()
    lines = [withdrawal, answer] if first else [answer, withdrawal]
    without = events.parse({"a.jsonl": [answer, other]})
    assert len(resolve(without.rows, (), ()).answers) == 2
    parsed = events.parse({"a.jsonl": [*lines, other]})
    result = resolve(parsed.rows, (), ())
    assert [row.event.event_id for row in result.answers] == ["e2"]
    assert parsed.rejected + result.rejected == []
    events.to_frame(result.events).to_json()  # can be written


def test_repeated_withdrawal_is_counted_as_a_repeat(event: EventFactory) -> None:
    line = events.to_json(event("w", answer="withdrawn", replaces="e1")).encode()
    parsed = events.parse({"a.jsonl": [line, line.replace(b'"seed":7', b'"seed":8')]})
    assert (len(parsed.rows), len(parsed.repeats)) == (1, 1)


@pytest.mark.parametrize("named", ["e1", "c1", "c2"])
def test_withdrawal_removes_the_whole_chain_of_corrections(event: EventFactory, named: str) -> None:
    chain = event("e1"), event("c1", replaces="e1", answer="no"), event("c2", replaces="c1")
    assert in_effect(*chain) == ["c2"]
    assert in_effect(*chain, event("w", answer="withdrawn", replaces=named)) == []


def test_withdrawal_of_an_invalid_answer_removes_its_correction(event: EventFactory) -> None:
    feedback = rows(event("e1"), event("c1", replaces="e1"), event("w", answer="withdrawn", replaces="e1"))
    assert [r.event.event_id for r in resolve(feedback[:2], feedback[:1], ["e1"]).answers] == ["c1"]
    assert resolve(feedback, feedback[:1], ["e1"]).answers == []


def test_withdrawal_restores_no_superseded_answer(event: EventFactory) -> None:
    first, again = event("e1", answer="no"), event("e2", created_at="2024-05-02T00:00:00Z")
    assert in_effect(first, again, event("w", answer="withdrawn", replaces="e2")) == []
    assert in_effect(first, again, event("w", answer="withdrawn", replaces="e1")) == ["e2"]


def test_rater_can_answer_again_after_a_withdrawal(event: EventFactory) -> None:
    withdrawn = event("e1"), event("w", answer="withdrawn", replaces="e1")
    assert in_effect(*withdrawn, event("e2", created_at="2024-05-02T00:00:00Z")) == ["e2"]
    for changes in WITHDRAWALS.values():
        withdrawal = event("w", **{**changes, "answer": "withdrawn", "replaces": "e1"})
        assert in_effect(event("e1"), withdrawal, event("e2", replaces="w")) == ["e2"]


@pytest.mark.parametrize("rater", ["r2", "Jane Doe", ""])
def test_answers_of_other_raters_cannot_be_withdrawn(event: EventFactory, rater: str) -> None:
    answer, other = event("e1"), event("c1", rater="r2", replaces="e1")
    lines = [
        answer,
        other,
        *(event(w, rater=rater, answer="withdrawn", replaces=r) for w, r in (("w", "e1"), ("v", "c1"))),
    ]
    parsed = events.parse({"a.jsonl": [events.to_json(e).encode() for e in lines]})
    result = resolve(parsed.rows, (), {r.event_id for r in parsed.rejected if r.event_id})
    assert [row.event.event_id for row in result.answers] == ["e1"]
    assert "w" in {r.event_id for r in parsed.rejected + result.rejected}
    invalid = resolve(parsed.rows, parsed.rows[:1], {r.event_id for r in parsed.rejected if r.event_id})
    assert "w" in {r.event_id for r in parsed.rejected + invalid.rejected}, "nor invalid ones"


def test_withdrawal_of_an_unknown_event_is_quarantined(event: EventFactory) -> None:
    [quarantined] = resolved(event("w", answer="withdrawn", replaces="e9")).rejected
    assert (quarantined.rule, quarantined.got) == ("replaces", "no event e9")


def test_long_chains_and_cycles_are_resolved_in_linear_time(event: EventFactory) -> None:
    n = 20_000
    chain = [event("e0"), *(event(f"e{i}", replaces=f"e{i - 1}") for i in range(1, n))]
    assert in_effect(*chain) == [f"e{n - 1}"]
    assert in_effect(*chain, event("w", answer="withdrawn", replaces="e7")) == []
    cycle = event("a", replaces="b"), event("b", replaces="a")
    assert in_effect(*cycle, event("w", answer="withdrawn", replaces="a")) == []

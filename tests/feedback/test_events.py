"""No line is dropped: each is an event, a repeat, or a quarantined row with reason and remedy."""

from __future__ import annotations

import dataclasses
import json

import pytest
from conftest import EventFactory, digest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deleatur.feedback import events
from deleatur.feedback.events import EventRow, ParsedEvents
from deleatur.records.feedback import FeedbackEvent


def line(event: FeedbackEvent, **changes: object) -> bytes:
    return json.dumps({**dataclasses.asdict(event), **changes}).encode()


def parse(*lines: bytes) -> ParsedEvents:
    return events.parse({"a.jsonl": lines})


def test_event_round_trips_through_json(event: EventFactory) -> None:
    original = event(kind="rank", ranks=(1, None, 2, None, 3), labels=("blurry",), severity=2, unblurred=True)
    [row] = parse(events.to_json(original).encode()).rows
    assert row == EventRow("a.jsonl", 1, original)


BAD = {
    "not JSON": (b'{"event_id": "e9", ', "json"),
    "not UTF-8": (b'{"event_id": "\xff"}', "json"),
    "half a surrogate": (b'{"event_id": "\\ud800"}', "json"),
    "not an object": (b"[1, 2]", "fields"),
    "too deep": (b"[" * 10_000, "json"),
    "nothing in it": (b"{}", "fields"),
    "unknown field": ({"mood": "good"}, "fields"),
    "text for a number": ({"seed": "7"}, "fields"),
    "fraction for a number": ({"seed": 7.5}, "fields"),
    "boolean for a number": ({"seed": True}, "fields"),
    "number for a text": ({"prompt": 7}, "fields"),
    "too large": ({"seed": 2**63}, "fields"),
    "NaN": ({"seconds_spent": float("nan")}, "fields"),
    "unknown answer": ({"answer": "maybe"}, "fields"),
    "unknown kind": ({"kind": "stars"}, "fields"),
    "items not a list": ({"items": "abc"}, "fields"),
    "text for a rank": ({"ranks": [1, "X"]}, "fields"),
    "e-mail for a hash": ({"rater": "jane@example.org"}, "rater"),
    "name for a hash": ({"rater": "Jane Doe"}, "rater"),
    "empty rater": ({"rater": ""}, "rater"),
}


@pytest.mark.parametrize(("bad", "rule"), BAD.values(), ids=BAD.keys())
def test_bad_row_is_quarantined_and_others_are_kept(
    event: EventFactory, bad: bytes | dict[str, object], rule: str
) -> None:
    bad_line = bad if isinstance(bad, bytes) else line(event("bad"), **bad)
    parsed = parse(line(event("e1")), bad_line, line(event("e2")))
    assert [row.event.event_id for row in parsed.rows] == ["e1", "e2"]
    [quarantined] = parsed.rejected
    assert (quarantined.file, quarantined.line, quarantined.rule) == ("a.jsonl", 2, rule)
    assert quarantined.expected
    assert quarantined.got
    assert quarantined.remedy
    assert quarantined.row
    assert len(quarantined.row) <= events.MAX_ROW_CHARS


def test_duplicate_field_is_quarantined(event: EventFactory) -> None:
    [quarantined] = parse(line(event())[:-1] + b', "answer": "no"}').rejected
    assert quarantined.got == "answer more than once"


@pytest.mark.parametrize("rater", ["jane@example.org", "Jane Doe", "Jane\u00a0Doe"])
@pytest.mark.parametrize("other_changes", [{}, {"seed": "7"}])
def test_quarantine_contains_no_name(event: EventFactory, rater: str, other_changes: dict[str, object]) -> None:
    [quarantined] = parse(line(event(), rater=rater, **other_changes)).rejected
    assert "ane" not in "".join(map(str, vars(quarantined).values()))


def test_repeats_are_counted_and_conflicts_quarantined(event: EventFactory) -> None:
    spaced = line(event("e1"))
    parsed = parse(spaced, events.to_json(event("e1")).encode(), line(event("e1", answer="no")))
    assert (len(parsed.rows), len(parsed.repeats)) == (1, 1)
    [quarantined] = parsed.rejected
    assert (quarantined.line, quarantined.event_id, quarantined.rule, quarantined.got) == (
        3,
        "e1",
        "repeat",
        "different answer",
    )


def test_windows_line_endings_and_byte_order_mark(event: EventFactory) -> None:
    parsed = parse(b"\xef\xbb\xbf" + line(event("e1")) + b"\r\n", b"\r\n", line(event("e2")) + b"\r\n")
    assert [(row.line, row.event.event_id) for row in parsed.rows] == [(1, "e1"), (3, "e2")]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
EVENTS = st.builds(
    FeedbackEvent,
    event_id=st.sampled_from(["a", "b", "c", "d"]),  # few, so that ids collide
    concept=TEXT,
    kind=st.sampled_from(["binary", "rank"]),
    items=st.lists(TEXT, max_size=3).map(tuple),
    prompt=TEXT,
    seed=st.integers(-(2**63) + 1, 2**63 - 1),
    model_version=TEXT,
    rater=st.sampled_from(["r1", "r2"]),
    answer=st.sampled_from(["yes", "no", "unsure", "skip", "ranked", "withdrawn"]),
    source=TEXT,
    created_at=TEXT,
    consent_version=TEXT,
    ranks=st.none() | st.lists(st.none() | st.integers(-9, 9), max_size=3).map(tuple),
    labels=st.lists(TEXT, max_size=2).map(tuple),
    severity=st.none() | st.integers(0, 9),
    seconds_spent=st.none() | st.floats(allow_nan=False, allow_infinity=False),
)
JSON = st.recursive(st.none() | st.booleans() | st.floats() | TEXT, lambda x: st.lists(x) | st.dictionaries(TEXT, x))
GARBAGE = st.binary(min_size=1).filter(lambda b: b.strip() and b"\n" not in b) | JSON.map(
    lambda x: json.dumps(x).encode()
)


@given(st.lists(EVENTS.map(lambda e: events.to_json(e).encode()) | GARBAGE, max_size=20))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_line_is_in_exactly_one_list(lines: list[bytes]) -> None:
    parsed = parse(*lines)
    lines_in_lists = [row.line for group in (parsed.rows, parsed.rejected, parsed.repeats) for row in group]
    assert sorted(lines_in_lists) == list(range(1, len(lines) + 1))
    assert len({row.event.event_id for row in parsed.rows}) == len(parsed.rows)


def rows(*feedback: FeedbackEvent) -> list[EventRow]:
    return [EventRow("a.jsonl", i, e) for i, e in enumerate(feedback, 1)]


def ids(event_rows: list[EventRow]) -> list[str]:
    return [row.event.event_id for row in event_rows]


def test_a_correction_replaces_and_a_withdrawal_removes(event: EventFactory) -> None:
    feedback = rows(
        event("e1"),
        event("e2", rater="r2"),
        event("e3", rater="r3"),
        event("c1", answer="no", replaces="e1"),
        event("w2", rater="r2", answer="withdrawn", replaces="e2", items=()),
        event("c2", replaces="c1"),
    )
    valid, rejected = events.resolve_replacements(feedback, ())
    assert valid == feedback, "replaced events stay in the table"
    assert rejected == []
    assert ids(events.current_answers(valid)) == ["e3", "c2"]


def test_withdrawing_a_correction_does_not_restore_the_original(event: EventFactory) -> None:
    feedback = rows(event("e1"), event("c1", replaces="e1"), event("w", answer="withdrawn", replaces="c1"))
    assert events.current_answers(events.resolve_replacements(feedback, ())[0]) == []


def test_corrections_are_independent_of_file_order(event: EventFactory) -> None:
    new = event("c1", answer="no", replaces="e1", created_at="2024-05-01T11:00:00+00:00")
    assert ids(events.current_answers(events.resolve_replacements(rows(new, event("e1")), ())[0])) == ["c1"]


def test_latest_answer_of_a_rater_counts(event: EventFactory) -> None:
    first, again = event("e1", created_at="2024-05-02T00:00:00Z"), event("e2", answer="no")
    assert ids(events.current_answers(rows(first, again, event("e3", rater="r2")))) == ["e1", "e3"]


WRONG = {
    "unknown event": {"replaces": "e0"},
    "itself": {"replaces": "c1"},
    "another rater's": {"replaces": "e1", "rater": "r2"},
    "another concept's": {"replaces": "e1", "concept": "style"},
    "another picture's": {"replaces": "e1", "items": (digest("p9"),)},
    "a newer one": {"replaces": "e1", "created_at": "2024-04-30T23:59:59Z"},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG.keys())
def test_invalid_correction_is_quarantined(event: EventFactory, changes: dict[str, object]) -> None:
    valid, [quarantined] = events.resolve_replacements(rows(event("e1"), event("c1", **changes)), ())
    assert ids(valid) == ["e1"]
    assert (quarantined.line, quarantined.rule, quarantined.event_id) == (2, "replaces", "c1")
    assert quarantined.remedy


def test_quarantined_event_can_be_replaced(event: EventFactory) -> None:
    valid, rejected = events.resolve_replacements(rows(event("c1", replaces="broken")), {"broken"})
    assert (ids(valid), rejected) == (["c1"], [])


def test_digest_depends_on_content_only(event: EventFactory) -> None:
    original = rows(event("e1"), event("e2"))
    moved = [dataclasses.replace(row, file="b.jsonl", line=9) for row in reversed(original)]
    assert events.digest(original) == events.digest(moved)
    assert events.digest(original) != events.digest(original[:1])


@pytest.mark.parametrize(
    "created_at", ["2024-05-01T10:00:00", "2024-05-01T10:00:00+02:00", "yesterday", "2024-13-01T00:00Z"]
)
def test_only_utc_times_are_valid(created_at: str) -> None:
    assert events.parse_utc(created_at) is None
    assert events.parse_utc("2024-05-01T10:00:00.5Z") == events.parse_utc("2024-05-01T10:00:00.500+00:00") is not None

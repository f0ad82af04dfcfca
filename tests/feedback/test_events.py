"""Nothing is dropped: every line is an event, a repeat, or a row in quarantine with reason and remedy."""

from __future__ import annotations

import dataclasses
import json

import pytest
from conftest import Make, digest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deleatur.feedback import events
from deleatur.feedback.events import Parsed, Row
from deleatur.records.feedback import Feedback


def line(event: Feedback, **changes: object) -> bytes:
    return json.dumps({**dataclasses.asdict(event), **changes}).encode()


def parse(*lines: bytes) -> Parsed:
    return events.parse({"a.jsonl": lines})


def test_an_event_survives_its_line(event: Make) -> None:
    there = event(kind="rank", ranks=(1, None, 2, None, 3), labels=("blurry",), severity=2, unblurred=True)
    [row] = parse(events.to_json(there).encode()).rows
    assert row == Row("a.jsonl", 1, there)


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
    "truth for a number": ({"seed": True}, "fields"),
    "number for a text": ({"prompt": 7}, "fields"),
    "too large": ({"seed": 2**63}, "fields"),
    "NaN": ({"seconds_spent": float("nan")}, "fields"),
    "unknown answer": ({"answer": "maybe"}, "fields"),
    "unknown kind": ({"kind": "stars"}, "fields"),
    "items no list": ({"items": "abc"}, "fields"),
    "rank a text": ({"ranks": [1, "X"]}, "fields"),
    "e-mail for a hash": ({"rater": "jane@example.org"}, "rater"),
    "name for a hash": ({"rater": "Jane Doe"}, "rater"),
    "nobody": ({"rater": ""}, "rater"),
}


@pytest.mark.parametrize(("bad", "rule"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_is_kept_aside_and_the_others_survive(event: Make, bad: bytes | dict[str, object], rule: str) -> None:
    bad_line = bad if isinstance(bad, bytes) else line(event("bad"), **bad)
    parsed = parse(line(event("e1")), bad_line, line(event("e2")))
    assert [row.event.event_id for row in parsed.rows] == ["e1", "e2"]
    [aside] = parsed.rejected
    assert (aside.file, aside.line, aside.rule) == ("a.jsonl", 2, rule)
    assert aside.expected
    assert aside.got
    assert aside.remedy
    assert aside.row
    assert len(aside.row) <= events.ROW_CHARS


def test_a_field_given_twice_is_ambiguous(event: Make) -> None:
    [aside] = parse(line(event())[:-1] + b', "answer": "no"}').rejected
    assert aside.got == "answer more than once"


@pytest.mark.parametrize("rater", ["jane@example.org", "Jane Doe", "Jane\u00a0Doe"])
@pytest.mark.parametrize("other", [{}, {"seed": "7"}])
def test_quarantine_repeats_no_name(event: Make, rater: str, other: dict[str, object]) -> None:
    [aside] = parse(line(event(), rater=rater, **other)).rejected
    assert "ane" not in "".join(map(str, vars(aside).values()))


def test_repeats_are_counted_and_contradictions_kept_aside(event: Make) -> None:
    spaced = line(event("e1"))
    parsed = parse(spaced, events.to_json(event("e1")).encode(), line(event("e1", answer="no")))
    assert (len(parsed.rows), len(parsed.repeats)) == (1, 1)
    [aside] = parsed.rejected
    assert (aside.line, aside.event_id, aside.rule, aside.got) == (3, "e1", "repeat", "other answer")


def test_windows_line_ends_and_byte_order_mark(event: Make) -> None:
    parsed = parse(b"\xef\xbb\xbf" + line(event("e1")) + b"\r\n", b"\r\n", line(event("e2")) + b"\r\n")
    assert [(row.line, row.event.event_id) for row in parsed.rows] == [(1, "e1"), (3, "e2")]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
EVENTS = st.builds(
    Feedback,
    event_id=st.sampled_from(["a", "b", "c", "d"]),  # few, so that ids meet
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
def test_every_line_ends_in_exactly_one_place(lines: list[bytes]) -> None:
    parsed = parse(*lines)
    places = [row.line for group in (parsed.rows, parsed.rejected, parsed.repeats) for row in group]
    assert sorted(places) == list(range(1, len(lines) + 1))
    assert len({row.event.event_id for row in parsed.rows}) == len(parsed.rows)


def rows(*found: Feedback) -> list[Row]:
    return [Row("a.jsonl", i, e) for i, e in enumerate(found, 1)]


def ids(found: list[Row]) -> list[str]:
    return [row.event.event_id for row in found]


def test_a_correction_replaces_and_a_withdrawal_removes(event: Make) -> None:
    given = rows(
        event("e1"),
        event("e2", rater="r2"),
        event("e3", rater="r3"),
        event("c1", answer="no", replaces="e1"),
        event("w2", rater="r2", answer="withdrawn", replaces="e2", items=()),
        event("c2", replaces="c1"),
    )
    kept, rejected = events.link(given, ())
    assert kept == given  # the table only grows
    assert rejected == []
    assert ids(events.current(kept)) == ["e3", "c2"]


def test_withdrawing_a_correction_brings_nothing_back(event: Make) -> None:
    given = rows(event("e1"), event("c1", replaces="e1"), event("w", answer="withdrawn", replaces="c1"))
    assert events.current(events.link(given, ())[0]) == []


def test_the_order_of_files_does_not_matter_to_corrections(event: Make) -> None:
    new = event("c1", answer="no", replaces="e1", created_at="2024-05-01T11:00:00+00:00")
    assert ids(events.current(events.link(rows(new, event("e1")), ())[0])) == ["c1"]


def test_the_last_word_of_a_rater_counts(event: Make) -> None:
    first, again = event("e1", created_at="2024-05-02T00:00:00Z"), event("e2", answer="no")
    assert ids(events.current(rows(first, again, event("e3", rater="r2")))) == ["e1", "e3"]


WRONG = {
    "nobody's answer": {"replaces": "e0"},
    "itself": {"replaces": "c1"},
    "another rater's": {"replaces": "e1", "rater": "r2"},
    "another concept's": {"replaces": "e1", "concept": "style"},
    "another picture's": {"replaces": "e1", "items": (digest("p9"),)},
    "a younger one": {"replaces": "e1", "created_at": "2024-04-30T23:59:59Z"},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG.keys())
def test_a_correction_of_something_else_is_kept_aside(event: Make, changes: dict[str, object]) -> None:
    kept, [aside] = events.link(rows(event("e1"), event("c1", **changes)), ())
    assert ids(kept) == ["e1"]
    assert (aside.line, aside.rule, aside.event_id) == (2, "replaces", "c1")
    assert aside.remedy


def test_replacing_a_row_in_quarantine_mends_it(event: Make) -> None:
    kept, rejected = events.link(rows(event("c1", replaces="broken")), {"broken"})
    assert (ids(kept), rejected) == (["c1"], [])


def test_the_digest_is_about_content_only(event: Make) -> None:
    there = rows(event("e1"), event("e2"))
    elsewhere = [dataclasses.replace(row, file="b.jsonl", line=9) for row in reversed(there)]
    assert events.digest(there) == events.digest(elsewhere)
    assert events.digest(there) != events.digest(there[:1])


@pytest.mark.parametrize(
    "given", ["2024-05-01T10:00:00", "2024-05-01T10:00:00+02:00", "yesterday", "2024-13-01T00:00Z"]
)
def test_only_utc_is_a_time(given: str) -> None:
    assert events.utc(given) is None
    assert events.utc("2024-05-01T10:00:00.5Z") == events.utc("2024-05-01T10:00:00.500+00:00") is not None

"""No line is dropped: each is an event, a repeat, or a quarantined row with reason and remedy."""

from __future__ import annotations

import codecs
import dataclasses
import json
import time
from datetime import UTC, datetime, timedelta

import pytest
from conftest import EventFactory
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


@pytest.mark.parametrize("rater", ["Jane Doe", "jane@example.org", ""])
def test_a_withdrawal_under_a_name_is_quarantined_too(event: EventFactory, rater: str) -> None:
    parsed = parse(line(event("w"), rater=rater, answer="withdrawn", replaces="e1"))
    assert parsed.rows == []
    assert [row.rule for row in parsed.rejected] == ["rater"]
    assert not rater or rater not in parsed.rejected[0].row


def test_the_canonical_line_is_compact_sorted_and_unescaped(event: EventFactory) -> None:
    text = events.to_json(event("e1", prompt="ein Käfer"))
    assert '"prompt":"ein Käfer"' in text
    assert text == json.dumps(dict(sorted(json.loads(text).items())), ensure_ascii=False, separators=(",", ":"))


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
    ids = [row.event.event_id for row in parsed.rows if not row.is_withdrawal]
    assert len(set(ids)) == len(ids)


def test_digest_depends_on_content_only(event: EventFactory) -> None:
    original = [EventRow("a.jsonl", i, event(f"e{i}")) for i in (1, 2)]
    moved = [dataclasses.replace(row, file="b.jsonl", line=9) for row in reversed(original)]
    assert events.digest(original) == events.digest(moved)
    assert events.digest(original) != events.digest(original[:1])


@pytest.mark.parametrize(
    "created_at", ["2024-05-01T10:00:00", "2024-05-01T10:00:00+02:00", "yesterday", "2024-13-01T00:00Z"]
)
def test_only_utc_times_are_valid(created_at: str) -> None:
    assert events.parse_utc(created_at) is None
    assert events.parse_utc("2024-05-01T10:00:00.5Z") == events.parse_utc("2024-05-01T10:00:00.500+00:00") is not None


NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("offset", "is_valid"), [(-timedelta(days=900), True), (timedelta(hours=14), True), (timedelta(days=2), False)]
)
def test_times_in_the_future_are_invalid_beyond_a_tolerance(offset: timedelta, is_valid: bool) -> None:
    assert (events.event_time((NOW + offset).isoformat(), NOW) is not None) == is_valid
    assert events.event_time("2999-01-01T00:00:00Z", NOW) is None


HOSTILE = {
    "base64": b"A" * 1_000_000,
    "base64 image": b'{"event_id": "e", "prompt": "' + b"QUJD" * 250_000 + b'", "seed": "x"}',
    "at signs": b"@" * 1_000_000,
    "words": b"a " * 500_000,
    "almost addresses": b"a@ " * 300_000,
    "raters": b'"rater"' * 140_000,
    "spaces after rater": (b'"rater"' + b" " * 1000) * 1000,
    "duplicate keys": b"{" + b",".join(b'"k%d":1,"k%d":1' % (i, i) for i in range(40_000)) + b"}",
    "brackets": b"[" * 1_000_000,
    "braces": b'{"a":' * 200_000,
    "backslashes": b"\\" * 1_000_000,
    "NUL bytes": b"\0" * 1_000_000,
}


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_line_of_a_megabyte_is_quarantined_in_linear_time(line: bytes) -> None:
    """A quadratic pattern takes hours on one of these."""
    started = time.process_time()
    [quarantined] = parse(line).rejected
    assert time.process_time() - started < 1
    assert len(quarantined.row) <= events.MAX_ROW_CHARS
    assert len(quarantined.got) <= events.MAX_GOT_CHARS
    assert (quarantined.row + quarantined.got).isprintable()


def test_many_duplicate_fields_take_linear_time(event: EventFactory) -> None:
    started = time.process_time()
    [quarantined] = parse(line(event())[:-1] + b', "seed": 7' * 90_000 + b"}").rejected
    assert time.process_time() - started < 2
    assert quarantined.got == "seed more than once"


@pytest.mark.parametrize("length", [40, 200, 2000])
@pytest.mark.parametrize("offset", range(-24, 3, 2))
def test_no_part_of_an_address_at_the_cut_is_shown(length: int, offset: int) -> None:
    text = "x" * (length + offset - 1) + " jane.doe@example.org " + "y" * 3000
    assert "jane" not in events.redact_personal_data(text, length)
    assert len(events.redact_personal_data(text, length)) <= length


IDS = {"blank": " ", "empty": "", "NUL": "a\0b", "line break": "a\nb", "bidi": "a\u202eb", "very long": "x" * 10_000}


@pytest.mark.parametrize("event_id", IDS.values(), ids=IDS.keys())
@pytest.mark.parametrize("field", ["event_id", "replaces"])
def test_ids_are_short_and_printable(event: EventFactory, field: str, event_id: str) -> None:
    parsed = parse(line(event("e1")), line(event("e2", rater="r2"), **{field: event_id}))
    assert [row.event.event_id for row in parsed.rows] == ["e1"]
    [quarantined] = parsed.rejected
    assert (quarantined.rule, quarantined.event_id) == ("event id", "e2" if field == "replaces" else None)
    assert len(quarantined.got) <= events.MAX_GOT_CHARS


def test_byte_order_mark_inside_joined_files(event: EventFactory) -> None:
    assert len(parse(line(event("e1")), codecs.BOM_UTF8 + line(event("e2"))).rows) == 2


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_file_is_one_quarantine_row(event: EventFactory, encoding: str) -> None:
    text = "\ufeff" + "\r\n".join(line(event(f"e{i}")).decode() for i in range(5))
    parsed = events.parse({"a.jsonl": text.encode(encoding).splitlines(True), "b.jsonl": [line(event("e9"))]})
    assert [row.event.event_id for row in parsed.rows] == ["e9"]
    [quarantined] = parsed.rejected
    assert (quarantined.got, quarantined.remedy) == ("UTF-16", "save the file as UTF-8")


def test_pointer_of_git_lfs_is_one_quarantine_row_that_names_it(event: EventFactory) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n".splitlines(True)
    parsed = events.parse({"in/a.jsonl": pointer, "in/b.jsonl": [line(event("e9"))]})
    assert [row.event.event_id for row in parsed.rows] == ["e9"]
    [quarantined] = parsed.rejected
    assert "pointer of Git LFS" in quarantined.got
    assert quarantined.remedy.startswith("git -C in lfs pull")


def test_truncated_and_padded_lines_are_quarantined_and_the_rest_is_used(event: EventFactory) -> None:
    valid = line(event("e1"))
    parsed = parse(valid, valid[:-20], line(event("e2")) + b"\0" * 100, b"\0" * 4096, line(event("e3")))
    assert [row.event.event_id for row in parsed.rows] == ["e1", "e3"]
    assert [row.line for row in parsed.rejected] == [2, 3, 4]

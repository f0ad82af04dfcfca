"""JSON lines → feedback events → current answers. No line is dropped: one that cannot be used is quarantined with
reason and remedy.

One line is one `FeedbackEvent`: its fields as a JSON object, `ranks` a list with null for "X". Rules that need only the
row itself are checked here; rules that need concepts or images are expectations (`feedback.expectations`).
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pandas as pd
import pyarrow as pa
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated

from deleatur.records.feedback import FeedbackEvent

EVENT_SCHEMA = pa.schema(
    {
        "event_id": pa.string(),
        "concept": pa.string(),
        "kind": pa.string(),
        "items": pa.list_(pa.string()),
        "prompt": pa.string(),
        "seed": pa.int64(),
        "model_version": pa.string(),
        "rater": pa.string(),
        "answer": pa.string(),
        "source": pa.string(),
        "created_at": pa.string(),
        "consent_version": pa.string(),
        "ranks": pa.list_(pa.int64()),
        "labels": pa.list_(pa.string()),
        "severity": pa.int64(),
        "reason": pa.string(),
        "seconds_spent": pa.float64(),
        "unblurred": pa.bool_(),
        "replaces": pa.string(),
        "file": pa.string(),
        "line": pa.int64(),
    }
)
"""Columns of events.parquet and answers.parquet: the fields of `FeedbackEvent`, and the file and line of the row."""

QUARANTINE_SCHEMA = pa.schema(
    {
        "file": pa.string(),
        "line": pa.int64(),
        "event_id": pa.string(),
        "rule": pa.string(),
        "expected": pa.string(),
        "got": pa.string(),
        "remedy": pa.string(),
        "row": pa.string(),
    }
)

FIELDS = tuple(f.name for f in dataclasses.fields(FeedbackEvent))
MAX_ROW_CHARS = 2000  # a complete event with five images takes about 900
MAX_GOT_CHARS = 200
REDACTED = "[hidden]"
NOT_A_HASH = re.compile(r"[@\s]")
RATER = re.compile(r'("rater"\s*:\s*")((?:[^"\\]|\\.)*)')
EMAIL = re.compile(r"[^\s\"'<>@]+@[^\s\"'<>@]+")

_strict_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_event_adapter = TypeAdapter(validated(FeedbackEvent, frozen=True, config=_strict_config))


@dataclass(frozen=True)
class EventRow:
    """An event with its file and line; lines count from 1."""

    file: str
    line: int
    event: FeedbackEvent


@dataclass(frozen=True)
class QuarantineRow:
    """A line that cannot be used, and why. `got` and `row` are redacted: no personal names, no e-mail addresses."""

    file: str
    line: int
    event_id: str | None
    rule: str
    expected: str
    got: str
    remedy: str
    row: str


@dataclass(frozen=True)
class ParsedEvents:
    rows: list[EventRow]
    rejected: list[QuarantineRow]
    repeats: list[EventRow]
    """Exact repetitions of an earlier event; counted, not used."""


def parse(sources: Mapping[str, Iterable[bytes]]) -> ParsedEvents:
    """Parses every file; each non-blank line ends up in exactly one of the three lists, in order of appearance."""
    parsed, first_seen = ParsedEvents([], [], []), dict[str, FeedbackEvent]()
    for file, lines in sources.items():
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = parse_line(file, number, line)
            if isinstance(row, QuarantineRow):
                parsed.rejected.append(row)
            elif (known := first_seen.setdefault(row.event.event_id, row.event)) is row.event:
                parsed.rows.append(row)
            elif known == row.event:
                parsed.repeats.append(row)
            else:
                parsed.rejected.append(_conflicting_repeat(row, known))
    return parsed


def parse_line(file: str, number: int, line: bytes) -> EventRow | QuarantineRow:
    """Validates one line strictly: every required field, each of its declared type, no unknown field."""
    if number == 1:
        line = line.removeprefix(codecs.BOM_UTF8)  # Windows editors write one
    try:
        validated_event = _event_adapter.validate_json(line)
    except ValidationError as e:
        return _invalid_line(file, number, line, e)
    event = FeedbackEvent(**{name: getattr(validated_event, name) for name in FIELDS})
    # The line is now known to be one flat JSON object, so parsing it again for its keys cannot fail.
    keys = [key for key, _ in json.loads(line, object_pairs_hook=list)]
    integers = [event.seed, event.severity or 0, *(r or 0 for r in event.ranks or ())]
    row = EventRow(file, number, event)
    if len(keys) != len(set(keys)):
        duplicates = ", ".join(sorted({k for k in keys if keys.count(k) > 1}))
        return reject(row, "fields", "every field once", f"{duplicates} more than once", APPEND_CORRECTED)
    if max(map(abs, integers)) >= 2**63:
        return reject(row, "fields", "integers of at most 63 bits", str(max(integers, key=abs)), APPEND_CORRECTED)
    if not event.rater or NOT_A_HASH.search(event.rater):
        expected = "a salted hash of the rater, without @ and spaces"
        return reject(row, "rater", expected, "what may be a person's name or address", HASH_RATER)
    return row


APPEND_CORRECTED = "append the corrected row to the file; the event_id of a quarantined row may be used again"
HASH_RATER = "replace the name with a salted hash in this line, and delete every copy of the name"
USE_REPLACES = "a correction is a separate event: give it a new event_id and put the old event_id in replaces"


def reject(row: EventRow, rule: str, expected: str, got: str, remedy: str) -> QuarantineRow:
    """The quarantine row of an event that was parsed but cannot be used."""
    e = row.event
    return QuarantineRow(
        row.file, row.line, e.event_id, rule, expected, redact(got, MAX_GOT_CHARS), remedy, redact(to_json(e))
    )


def redact(text: str, length: int = MAX_ROW_CHARS) -> str:
    """Text for display: e-mail addresses and raters that are not hashes replaced, at most `length` characters."""
    text = RATER.sub(lambda m: m[1] + REDACTED if re.search(r"[@\s\\]", m[2]) else m[0], text)
    text = EMAIL.sub(REDACTED, text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _conflicting_repeat(row: EventRow, known: FeedbackEvent) -> QuarantineRow:
    different = ", ".join(name for name in FIELDS if getattr(row.event, name) != getattr(known, name))
    return reject(row, "repeat", "a new event_id, or an exact repetition", f"different {different}", USE_REPLACES)


def _invalid_line(file: str, number: int, line: bytes, error: ValidationError) -> QuarantineRow:
    """pydantic's errors of one line as one quarantine row."""
    errors = error.errors(include_url=False)
    not_json = errors[0]["type"] == "json_invalid"
    expected = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'line'}: {e['msg']}" for e in errors)
    got = "; ".join("nothing" if "missing" in e["type"] else repr(e["input"])[:MAX_GOT_CHARS] for e in errors)
    return QuarantineRow(
        file,
        number,
        _extract_event_id(line),
        "json" if not_json else "fields",
        "one JSON object in UTF-8" if not_json else redact(expected),
        redact(expected if not_json else got, MAX_GOT_CHARS),
        APPEND_CORRECTED,
        redact(line.decode("utf-8", "backslashreplace")),
    )


def _extract_event_id(line: bytes) -> str | None:
    """The id of a line that does not validate; None where it cannot be read."""
    try:
        parsed: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    event_id = parsed.get("event_id") if isinstance(parsed, dict) else None
    return event_id if isinstance(event_id, str) and event_id.isprintable() else None


def to_json(event: FeedbackEvent) -> str:
    """The canonical line of an event: sorted keys, no spaces, non-ASCII characters unescaped."""
    return json.dumps(vars(event), sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def digest(rows: Iterable[EventRow]) -> str:
    """SHA-256 over the canonical lines, sorted by event id: identifies the feedback independently of file names."""
    lines = (to_json(row.event) for row in sorted(rows, key=lambda row: row.event.event_id))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def to_frame(rows: Sequence[EventRow]) -> pd.DataFrame:
    """Rows as a table with the columns of `EVENT_SCHEMA`, in the same order."""
    records = [{**vars(row.event), "file": row.file, "line": row.line} for row in rows]
    return pd.DataFrame.from_records(records, columns=EVENT_SCHEMA.names)


def quarantine_frame(rejected: Sequence[QuarantineRow]) -> pd.DataFrame:
    """Quarantine rows as a table with the columns of `QUARANTINE_SCHEMA`."""
    return pd.DataFrame.from_records([vars(r) for r in rejected], columns=QUARANTINE_SCHEMA.names)


def parse_utc(created_at: str) -> datetime | None:
    """The time of an event; None unless it is ISO 8601 with a UTC offset of zero."""
    try:
        moment = datetime.fromisoformat(created_at)
    except ValueError:
        return None
    return moment.astimezone(UTC) if moment.utcoffset() == timedelta(0) else None


def resolve_replacements(
    rows: Sequence[EventRow], quarantined_ids: Collection[str]
) -> tuple[list[EventRow], list[QuarantineRow]]:
    """Separates rows with a valid `replaces` from those without; returns (valid, rejected).

    `replaces` must name an older event of the same rater and question. quarantined_ids: ids of rejected rows; an event
    that replaces one of them corrects a rejected answer, so it is valid. Every row needs a valid `created_at`.
    """
    positions = {row.event.event_id: i for i, row in enumerate(rows)}
    valid, rejected = list[EventRow](), list[QuarantineRow]()
    for i, row in enumerate(rows):
        old = row.event.replaces
        if old is None or (old not in positions and old in quarantined_ids):
            valid.append(row)
        elif old not in positions:
            expected = "replaces: the event_id of an earlier answer"
            remedy = "add the file with that event to ingest.sources"
            rejected.append(reject(row, "replaces", expected, f"no event {old}", remedy))
        elif problem := _replacement_problem(row.event, i, rows[positions[old]].event, positions[old]):
            remedy = "put the event_id of the event that this one corrects in replaces, or withdraw it"
            rejected.append(reject(row, "replaces", *problem, remedy))
        else:
            valid.append(row)
    return valid, rejected


def _replacement_problem(
    new: FeedbackEvent, position: int, old: FeedbackEvent, old_position: int
) -> tuple[str, str] | None:
    """(expected, got) when `new` may not replace `old`, else None."""
    if new.rater != old.rater:
        return "a correction by the same rater", "another rater's answer"
    if new.concept != old.concept or (new.answer != "withdrawn" and sorted(new.items) != sorted(old.items)):
        return "a correction about the same concept and images", "an answer about other ones"
    # Time, then position, is a strict order, so corrections cannot form a cycle.
    if _order_key(new, position) <= _order_key(old, old_position):
        return "a correction newer than the corrected event", f"{new.created_at}, not after {old.created_at}"
    return None


def _order_key(event: FeedbackEvent, position: int) -> tuple[datetime, int]:
    created_at = parse_utc(event.created_at)
    assert created_at is not None, "the expectations reject invalid times"
    return created_at, position


def current_answers(rows: Sequence[EventRow]) -> list[EventRow]:
    """The latest answer of each rater to each question, without replaced and withdrawn ones.

    A rater may answer a question again without `replaces`; the newer answer counts.
    """
    replaced = {row.event.replaces for row in rows}
    latest = dict[tuple[str, str, tuple[str, ...]], int]()
    for i, row in enumerate(rows):
        e = row.event
        if e.event_id in replaced or e.answer == "withdrawn":
            continue
        question = (e.concept, e.rater, tuple(sorted(e.items)))
        previous = latest.get(question)
        if previous is None or _order_key(e, i) > _order_key(rows[previous].event, previous):
            latest[question] = i
    return [rows[i] for i in sorted(latest.values())]

"""JSON lines → feedback events. No line is dropped: one that cannot be used is quarantined with reason and remedy.

One line is one `FeedbackEvent`: its fields as a JSON object, `ranks` a list with null for "X". Rules that need only the
row itself are checked here; rules that need concepts or images are expectations (`feedback.expectations`). A withdrawal
is exempt from all of them: it counts as long as it names its event and its rater.
"""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import PurePath
from typing import Any

import pandas as pd
import pyarrow as pa
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated

from deleatur.errors import LFS_POINTER
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
MAX_ID_CHARS = 200
MAX_ADDRESS_CHARS = 320  # of an e-mail address, RFC 3696
CLOCK_TOLERANCE = timedelta(days=1)
"""How far ahead of this machine's clock an event may be: local time sent as UTC is ahead by up to 14 hours."""
REDACTED = "[hidden]"
NOT_A_HASH = re.compile(r"[@\s]")
RATER = re.compile(r'("rater"\s*:\s*")((?:[^"\\]|\\.)*)')
WORD = re.compile(r"[^\s\"'<>]+")  # always matches to its end: linear, unlike a pattern that looks for an @

_strict_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_event_adapter = TypeAdapter(validated(FeedbackEvent, frozen=True, config=_strict_config))


@dataclass(frozen=True)
class EventRow:
    """An event with its file and line; lines count from 1."""

    file: str
    line: int
    event: FeedbackEvent

    @property
    def is_withdrawal(self) -> bool:
        return self.event.answer == "withdrawn"


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
    """Parses every file; each non-blank line ends up in exactly one of the three lists, in order of appearance.

    A file that has no lines of events, in UTF-16 or as a pointer of Git LFS, gives one quarantine row.
    """
    parsed, first_seen = ParsedEvents([], [], []), dict[object, FeedbackEvent]()
    for file, lines in sources.items():
        for number, line in enumerate(lines, 1):
            if number == 1 and (unreadable := _unreadable_file(file, line)):
                parsed.rejected.append(unreadable)
                break
            if not line.strip():
                continue
            row = parse_line(file, number, line)
            if isinstance(row, QuarantineRow):
                parsed.rejected.append(row)
                continue
            # A withdrawal may repeat the id of the answer that it withdraws.
            key = (row.event.event_id, row.event.rater, row.event.replaces) if row.is_withdrawal else row.event.event_id
            if (known := first_seen.setdefault(key, row.event)) is row.event:
                parsed.rows.append(row)
            elif known == row.event or row.is_withdrawal:
                parsed.repeats.append(row)
            else:
                parsed.rejected.append(_conflicting_repeat(row, known))
    return parsed


def _unreadable_file(file: str, first_line: bytes) -> QuarantineRow | None:
    """The quarantine row of a file whose first line shows that it holds no lines in UTF-8."""
    expected, got, remedy = "a file in UTF-8", "UTF-16", "save the file as UTF-8"
    if first_line.startswith(LFS_POINTER):
        expected, got = "a file of JSON lines", "a pointer of Git LFS, not the file"
        remedy = f"git -C {PurePath(file).parent.as_posix()} lfs pull, then: deleatur stage ingest"
    elif not first_line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return None
    return QuarantineRow(file, 1, None, "json", expected, got, remedy, "")


def parse_line(file: str, number: int, line: bytes) -> EventRow | QuarantineRow:
    """Validates one line strictly: every required field, each of its declared type, no unknown field.

    A withdrawal with invalid fields counts all the same, without these fields.
    """
    line = line.removeprefix(codecs.BOM_UTF8)  # Windows editors write one; concatenated files contain it mid-file
    row = _validate_line(file, number, line)
    if isinstance(row, QuarantineRow):
        withdrawal = _withdrawal(_json_object(line))
        return EventRow(file, number, withdrawal) if withdrawal else row
    if row.is_withdrawal and not row.event.replaces:
        return dataclasses.replace(row, event=dataclasses.replace(row.event, replaces=row.event.event_id))
    return row


def _validate_line(file: str, number: int, line: bytes) -> EventRow | QuarantineRow:
    try:
        validated_event = _event_adapter.validate_json(line)
    except ValidationError as e:
        return _invalid_line(file, number, line, e)
    event = FeedbackEvent(**{name: getattr(validated_event, name) for name in FIELDS})
    # The line is now known to be one flat JSON object, so parsing it again for its keys cannot fail.
    keys = Counter(key for key, _ in json.loads(line, object_pairs_hook=list))
    integers = [event.seed, event.severity or 0, *(r or 0 for r in event.ranks or ())]
    row = EventRow(file, number, event)
    if keys.total() > len(keys):
        duplicates = ", ".join(sorted(key for key, n in keys.items() if n > 1))
        return reject(row, "fields", "every field once", f"{duplicates} more than once", APPEND_CORRECTED)
    if max(map(abs, integers)) >= 2**63:
        return reject(row, "fields", "integers of at most 63 bits", str(max(integers, key=abs)), APPEND_CORRECTED)
    if not event.rater or NOT_A_HASH.search(event.rater):
        expected = "a salted hash of the rater, without @ and spaces"
        return reject(row, "rater", expected, "what may be a person's name or address", HASH_RATER)
    for name in ("event_id", "rater", "replaces"):
        value = getattr(event, name)
        if value is not None and not _is_id(value):
            expected = f"{name}: 1 to {MAX_ID_CHARS} printable characters"
            return reject(row, "event id", expected, repr(value), APPEND_CORRECTED)
    return row


def _withdrawal(values: Mapping[str, Any]) -> FeedbackEvent | None:
    """The withdrawal that an invalid line states, without its invalid fields; None if the line is not a withdrawal, or
    names no event or no rater. Without `replaces`, it withdraws the event that has its event_id.
    """
    texts: dict[str, Any] = {name: value if isinstance(value := values.get(name), str) else "" for name in TEXT_FIELDS}
    texts = {name: text.encode("utf-8", "ignore").decode() for name, text in texts.items()}  # no lone surrogates
    event_id, rater = texts["event_id"], texts["rater"]
    target = values.get("replaces") or event_id
    if str(values.get("answer")).strip().casefold() != "withdrawn" or not isinstance(target, str) or not _is_id(target):
        return None
    if not _is_id(rater) or NOT_A_HASH.search(rater):
        return None
    return FeedbackEvent(**texts, kind="binary", items=(), seed=0, answer="withdrawn", replaces=target)


TEXT_FIELDS = ("event_id", "concept", "prompt", "model_version", "rater", "source", "created_at", "consent_version")


def _is_id(text: str) -> bool:
    return bool(text.strip()) and len(text) <= MAX_ID_CHARS and text.isprintable()


APPEND_CORRECTED = "append the corrected row to the file; the event_id of a quarantined row may be used again"
HASH_RATER = "replace the name with a salted hash in this line, and delete every copy of the name"
USE_REPLACES = "a correction is a separate event: give it a new event_id and put the old event_id in replaces"


def reject(row: EventRow, rule: str, expected: str, got: str, remedy: str) -> QuarantineRow:
    """The quarantine row of an event that was parsed but cannot be used."""
    event_id = row.event.event_id if _is_id(row.event.event_id) else None
    return QuarantineRow(
        row.file,
        row.line,
        event_id,
        rule,
        expected,
        redact_personal_data(got, MAX_GOT_CHARS),
        remedy,
        redact_personal_data(to_json(row.event)),
    )


def redact_personal_data(text: str, length: int = MAX_ROW_CHARS) -> str:
    """Text for display: e-mail addresses and raters that are not hashes replaced, control characters escaped, at most
    `length` characters. Only the start of a long text is searched, far enough that no address is cut.
    """
    text = text[: length + MAX_ADDRESS_CHARS]
    text = RATER.sub(lambda m: m[1] + REDACTED if re.search(r"[@\s\\]", m[2]) else m[0], text)
    text = WORD.sub(lambda m: REDACTED if "@" in m[0] else m[0], text)
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _conflicting_repeat(row: EventRow, known: FeedbackEvent) -> QuarantineRow:
    different = ", ".join(name for name in FIELDS if getattr(row.event, name) != getattr(known, name))
    return reject(row, "repeat", "a new event_id, or an exact repetition", f"different {different}", USE_REPLACES)


def _invalid_line(file: str, number: int, line: bytes, error: ValidationError) -> QuarantineRow:
    """All errors that pydantic reports for one line, as one quarantine row."""
    errors = error.errors(include_url=False)
    not_json = errors[0]["type"] == "json_invalid"
    expected = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'line'}: {e['msg']}" for e in errors)
    got = "; ".join("nothing" if "missing" in e["type"] else repr(e["input"])[:MAX_GOT_CHARS] for e in errors)
    return QuarantineRow(
        file,
        number,
        event_id if isinstance(event_id := _json_object(line).get("event_id"), str) and _is_id(event_id) else None,
        "json" if not_json else "fields",
        "one JSON object in UTF-8" if not_json else redact_personal_data(expected),
        redact_personal_data(expected if not_json else got, MAX_GOT_CHARS),
        APPEND_CORRECTED,
        redact_personal_data(line.decode("utf-8", "backslashreplace").strip()),
    )


def _json_object(line: bytes) -> Mapping[str, Any]:
    """The fields of a line that does not validate; empty if it is not a JSON object."""
    try:
        parsed: Any = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def to_json(event: FeedbackEvent) -> str:
    """The canonical line of an event: sorted keys, no spaces, non-ASCII characters unescaped."""
    return json.dumps(vars(event), sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def digest(rows: Iterable[EventRow]) -> str:
    """SHA-256 over the canonical lines, sorted by event id: identifies the feedback independently of file names."""
    lines = [line for _, line in sorted((row.event.event_id, to_json(row.event)) for row in rows)]
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
        time = datetime.fromisoformat(created_at)
    except ValueError:
        return None
    return time.astimezone(UTC) if time.utcoffset() == timedelta(0) else None


def event_time(created_at: str, now: datetime) -> datetime | None:
    """The time of an event; None if it is invalid, or in the future: it would remain the latest answer."""
    time = parse_utc(created_at)
    return time if time and time <= now + CLOCK_TOLERANCE else None

"""JSON lines → events → current answers. Nothing is dropped: a row that cannot be used says why and what to do.

One line is one `Feedback`, its fields as JSON, `ranks` a list with null for "X". Rules that need only the row itself
are checked here; rules that need concepts or pictures are expectations.
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

from deleatur.records.feedback import Feedback

SCHEMA = pa.schema(
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
"""Columns of the tables of events and of answers: the fields of `Feedback`, and where the row stands."""

QUARANTINE = pa.schema(
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

FIELDS = tuple(f.name for f in dataclasses.fields(Feedback))
ROW_CHARS = 2000  # a full event of five pictures takes about 900
GOT_CHARS = 200
HIDDEN = "[hidden]"
PERSONAL = re.compile(r"[@\s]")
RATER = re.compile(r'("rater"\s*:\s*")((?:[^"\\]|\\.)*)')
EMAIL = re.compile(r"[^\s\"'<>@]+@[^\s\"'<>@]+")

_strict = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_adapter = TypeAdapter(validated(Feedback, frozen=True, config=_strict))


@dataclass(frozen=True)
class Row:
    """An event and where it stands; lines count from 1."""

    file: str
    line: int
    event: Feedback


@dataclass(frozen=True)
class Rejected:
    """A row of the quarantine. What looks like a person's name or address is hidden in `got` and `row`."""

    file: str
    line: int
    event_id: str | None
    rule: str
    expected: str
    got: str
    remedy: str
    row: str


@dataclass(frozen=True)
class Parsed:
    rows: list[Row]
    rejected: list[Rejected]
    repeats: list[Row]
    """The same event once more, letter for letter; counted, not used."""


def parse(sources: Mapping[str, Iterable[bytes]]) -> Parsed:
    """Every line that is not blank ends in exactly one of the three lists, in the order of appearance."""
    parsed, first = Parsed([], [], []), dict[str, Feedback]()
    for file, lines in sources.items():
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = read(file, number, line)
            if isinstance(row, Rejected):
                parsed.rejected.append(row)
            elif (known := first.setdefault(row.event.event_id, row.event)) is row.event:
                parsed.rows.append(row)
            elif known == row.event:
                parsed.repeats.append(row)
            else:
                parsed.rejected.append(_conflict(row, known))
    return parsed


def read(file: str, number: int, line: bytes) -> Row | Rejected:
    """One line, strictly: every field present, of its own type, none besides."""
    if number == 1:
        line = line.removeprefix(codecs.BOM_UTF8)  # editors on Windows put it there
    try:
        found = _adapter.validate_json(line)
    except ValidationError as e:
        return _unreadable(file, number, line, e)
    event = Feedback(**{name: getattr(found, name) for name in FIELDS})
    # From here on the line is one flat JSON object, so reading it again is safe.
    keys = [key for key, _ in json.loads(line, object_pairs_hook=list)]
    numbers = [event.seed, event.severity or 0, *(r or 0 for r in event.ranks or ())]
    row = Row(file, number, event)
    if len(keys) != len(set(keys)):
        twice = ", ".join(sorted({k for k in keys if keys.count(k) > 1}))
        return reject(row, "fields", "every field once", f"{twice} more than once", MEND)
    if max(map(abs, numbers)) >= 2**63:
        return reject(row, "fields", "whole numbers of at most 63 bits", str(max(numbers, key=abs)), MEND)
    if not event.rater or PERSONAL.search(event.rater):
        expected = "a salted hash of the rater, without @ and spaces"
        return reject(row, "rater", expected, "what may be a person's name or address", UNNAME)
    return row


MEND = "append the mended row to the file; the id of a row in quarantine is still free"
UNNAME = "replace the name by a salted hash in this very line, and erase the name wherever it was copied to"
CORRECT = "a correction is an event of its own: give it a new event_id and name the old one in replaces"


def reject(row: Row, rule: str, expected: str, got: str, remedy: str) -> Rejected:
    """The quarantine row of an event that could be read but cannot be used."""
    e = row.event
    return Rejected(row.file, row.line, e.event_id, rule, expected, shown(got, GOT_CHARS), remedy, shown(to_json(e)))


def shown(text: str, length: int = ROW_CHARS) -> str:
    """Text for a person's eyes: no e-mail address, no rater that is not a hash, not endless."""
    text = RATER.sub(lambda m: m[1] + HIDDEN if re.search(r"[@\s\\]", m[2]) else m[0], text)
    text = EMAIL.sub(HIDDEN, text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _conflict(row: Row, known: Feedback) -> Rejected:
    differ = ", ".join(name for name in FIELDS if getattr(row.event, name) != getattr(known, name))
    return reject(row, "repeat", "an event_id that is new, or the same event again", f"other {differ}", CORRECT)


def _unreadable(file: str, number: int, line: bytes, error: ValidationError) -> Rejected:
    """pydantic's findings as one row; its input is quoted only where it is a single value."""
    found = error.errors(include_url=False)
    broken = found[0]["type"] == "json_invalid"
    expected = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'line'}: {e['msg']}" for e in found)
    got = "; ".join("nothing" if "missing" in e["type"] else repr(e["input"])[:GOT_CHARS] for e in found)
    return Rejected(
        file,
        number,
        _event_id(line),
        "json" if broken else "fields",
        "one JSON object in UTF-8" if broken else shown(expected),
        shown(expected if broken else got, GOT_CHARS),
        MEND,
        shown(line.decode("utf-8", "backslashreplace")),
    )


def _event_id(line: bytes) -> str | None:
    """The id of a row that does not validate, if it can be made out."""
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    event_id = found.get("event_id") if isinstance(found, dict) else None
    return event_id if isinstance(event_id, str) and event_id.isprintable() else None


def to_json(event: Feedback) -> str:
    """The canonical line of an event: sorted keys, no spaces, letters as they are."""
    return json.dumps(vars(event), sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def digest(rows: Iterable[Row]) -> str:
    """SHA-256 over the canonical lines, sorted by event id: what the feedback says, whatever the files are called."""
    lines = (to_json(row.event) for row in sorted(rows, key=lambda row: row.event.event_id))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Rows as a table of `SCHEMA`'s columns, in the order given."""
    records = [{**vars(row.event), "file": row.file, "line": row.line} for row in rows]
    return pd.DataFrame.from_records(records, columns=SCHEMA.names)


def quarantine(rejected: Sequence[Rejected]) -> pd.DataFrame:
    return pd.DataFrame.from_records([vars(r) for r in rejected], columns=QUARANTINE.names)


def utc(created_at: str) -> datetime | None:
    """The moment an event names; None unless it is ISO 8601 with a zone, and that zone is UTC."""
    try:
        moment = datetime.fromisoformat(created_at)
    except ValueError:
        return None
    return moment.astimezone(UTC) if moment.utcoffset() == timedelta(0) else None


def link(rows: Sequence[Row], refused: Collection[str]) -> tuple[list[Row], list[Rejected]]:
    """Keeps what may stand in an append-only table: `replaces` names an older event of the same rater and question.

    `refused` are ids of rows in quarantine: replacing one of those is how a rejected answer is mended.
    Times must be valid, which the expectations have seen to.
    """
    places = {row.event.event_id: i for i, row in enumerate(rows)}
    kept, rejected = list[Row](), list[Rejected]()
    for i, row in enumerate(rows):
        old = row.event.replaces
        if old is None or (old not in places and old in refused):
            kept.append(row)
        elif old not in places:
            expected, remedy = (
                "replaces: the event_id of an earlier answer",
                "add the file that holds it to the sources",
            )
            rejected.append(reject(row, "replaces", expected, f"no event {old}", remedy))
        elif problem := _mismatch(row.event, i, rows[places[old]].event, places[old]):
            rejected.append(reject(row, "replaces", *problem, "name the event that this one corrects, or withdraw it"))
        else:
            kept.append(row)
    return kept, rejected


def _mismatch(new: Feedback, place: int, old: Feedback, old_place: int) -> tuple[str, str] | None:
    """What was expected and what came, when `new` may not replace `old`."""
    if new.rater != old.rater:
        return "a correction by the same rater", "another rater's answer"
    if new.concept != old.concept or (new.answer != "withdrawn" and sorted(new.items) != sorted(old.items)):
        return "a correction about the same concept and pictures", "an answer about others"
    # Time, then place, is a strict order: no chain of corrections can bite its own tail.
    if _order(new, place) <= _order(old, old_place):
        return "a correction younger than what it corrects", f"{new.created_at}, not after {old.created_at}"
    return None


def _order(event: Feedback, place: int) -> tuple[datetime, int]:
    moment = utc(event.created_at)
    assert moment is not None, "the expectations let no other time pass"
    return moment, place


def current(rows: Sequence[Row]) -> list[Row]:
    """The answers that count today: not replaced, not withdrawn, and the last word of each rater on each question.

    A rater who answers the same question again without naming the old event has changed their mind as well.
    """
    replaced = {row.event.replaces for row in rows}
    last = dict[tuple[str, str, tuple[str, ...]], int]()
    for i, row in enumerate(rows):
        e = row.event
        if e.event_id in replaced or e.answer == "withdrawn":
            continue
        question = (e.concept, e.rater, tuple(sorted(e.items)))
        rival = last.get(question)
        if rival is None or _order(e, i) > _order(rows[rival].event, rival):
            last[question] = i
    return [rows[i] for i in sorted(last.values())]

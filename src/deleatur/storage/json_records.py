"""Reports, verdicts and other records as canonical JSON, validated on writing and on reading.

The same content gives the same bytes, so a record's digest equals the `sha256sum` of its file.

Rejected are missing and unknown fields, wrong types (nothing is converted), numbers that are not finite, and blank
values in the fields that identify a result (`Provenance`, and the name and weights of a `DetectorInfo`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from deleatur.errors import DataError
from deleatur.records.report import DetectorInfo, Provenance
from deleatur.storage.files import atomic_write, require_file

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, ser_json_inf_nan="constants")
IDENTIFYING: Mapping[type, frozenset[str]] = {
    Provenance: frozenset(f.name for f in fields(Provenance)),
    DetectorInfo: frozenset({"name", "weights"}),
}
"""Fields that may not be blank. A value that does not exist (no champion) is null."""


def encode(document: object) -> bytes:
    """Canonical JSON: sorted keys, shortest exact floats, UTF-8, a newline at the end. Raises DataError."""
    record_type = type(document)
    raw = _adapter(record_type).dump_json([document], warnings=False)  # wrong types are reported below, by field
    valid = _validate(raw, record_type, f"the {record_type.__name__.lower()} to be written")
    plain = _adapter(record_type).dump_python([valid], mode="json")[0]
    return (json.dumps(plain, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def decode(data: bytes, record_type: type[T], source: str) -> T:
    """The record in `data`. Raises DataError naming `source` and every invalid field, never a value."""
    return _validate(b"[" + data + b"]", record_type, source)


def write(path: Path, document: object) -> None:
    """Writes atomically. A record that does not validate raises DataError and leaves the existing file."""
    data = encode(document)
    with atomic_write(path) as partial:
        partial.write_bytes(data)


def read(path: Path, record_type: type[T]) -> T:
    """Raises DataError if the file is missing or does not hold a valid record of this type."""
    require_file(path)
    return decode(path.read_bytes(), record_type, str(path))


def digest(document: object) -> str:
    """SHA-256 of the canonical JSON of a record, a settings section or a mapping."""
    return hashlib.sha256(encode(document)).hexdigest()


def schema(record_type: type) -> dict[str, Any]:
    """JSON Schema (2020-12) of a record type, for readers in other languages."""
    list_schema = _adapter(record_type).json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **list_schema["items"],
        "$defs": list_schema["$defs"],
    }


def _new_adapter(record_type: Any) -> TypeAdapter[Any]:
    # In a list of one: pydantic applies `config` to a dataclass inside another type, but not to a bare dataclass.
    return TypeAdapter(Annotated[list[record_type], Field(min_length=1, max_length=1)], config=STRICT)


_adapter: Callable[[Any], TypeAdapter[Any]] = cache(_new_adapter)
"""Of a record type. For mypy, which takes `type` for unhashable, any type is hashable."""


def _validate(data: bytes, record_type: type[T], source: str) -> T:
    try:
        document: T = _adapter(record_type).validate_json(data)[0]
    except ValidationError as e:
        problems = [f"{_dotted_name(error['loc'][1:])}: {error['msg']}" for error in e.errors(include_input=False)]
        raise _validation_error(source, record_type, problems) from None  # the cause would print the values
    if blank := list(_blank_fields(document)):
        raise _validation_error(source, record_type, [f"{name}: is blank, but identifies the result" for name in blank])
    return document


def _validation_error(source: str, record_type: type, problems: Sequence[str]) -> DataError:
    lines = "".join(f"\n  {problem}" for problem in problems)
    return DataError(
        f"{source} is not a valid {record_type.__name__.lower()}, {len(problems)} problem(s):{lines}",
        hint="recompute it: dvc repro --force",
    )


def _blank_fields(value: object, path: tuple[str | int, ...] = ()) -> Iterator[str]:
    if is_dataclass(value):
        for field in fields(value):
            inner = getattr(value, field.name)
            if field.name in IDENTIFYING.get(type(value), ()) and _is_blank(inner):
                yield _dotted_name((*path, field.name))
            yield from _blank_fields(inner, (*path, field.name))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _blank_fields(inner, (*path, i))


def _is_blank(value: object) -> bool:
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        return not value or any(map(_is_blank, value.values()))
    return isinstance(value, Sequence) and (not value or any(map(_is_blank, value)))


def _dotted_name(location: Sequence[str | int]) -> str:
    return ".".join(map(str, location)) or "(top)"

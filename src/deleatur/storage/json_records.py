"""Reports, verdicts and the other records as JSON: checked on the way out and on the way in, the same bytes for the
same content, so that a document's digest is what `sha256sum` says of its file.

What does not validate: a field missing or too many, a wrong type (nothing is converted), a number that is not finite,
and anything blank in what a result is identified by (`Identity`, and the name and weights of a `Detector`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from deleatur.errors import DataError
from deleatur.records.report import Detector, Identity
from deleatur.storage.files import replacing

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, ser_json_inf_nan="constants")
IDENTIFYING: Mapping[type, frozenset[str]] = {
    Identity: frozenset(f.name for f in fields(Identity)),
    Detector: frozenset({"name", "weights"}),
}
"""What may not be blank. Where there is nothing to name (no champion) the value is null, which says so."""


def encode(document: object) -> bytes:
    """Canonical JSON: sorted keys, shortest exact floats, UTF-8, a newline at the end. Raises DataError."""
    kind = type(document)
    given = _adapter(kind).dump_json([document], warnings=False)  # wrong types are found below, by name
    valid = _valid(given, kind, f"the {kind.__name__.lower()} to be written")
    plain = _adapter(kind).dump_python([valid], mode="json")[0]
    return (json.dumps(plain, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def decode(data: bytes, kind: type[T], where: str) -> T:
    """The document in `data`. Raises DataError naming `where` and every field that is wrong, never its content."""
    return _valid(b"[" + data + b"]", kind, where)


def write(path: Path, document: object) -> None:
    """The whole document or, when it does not validate, nothing: the file that was there stays."""
    data = encode(document)
    with replacing(path) as partial:
        partial.write_bytes(data)


def read(path: Path, kind: type[T]) -> T:
    """Raises DataError when the file is missing or does not hold a valid document of this kind."""
    if not path.is_file():
        raise DataError(f"no file {path}", hint="dvc status")
    return decode(path.read_bytes(), kind, str(path))


def digest(document: object) -> str:
    """SHA-256 of the canonical JSON; also of a settings section or a plain mapping."""
    return hashlib.sha256(encode(document)).hexdigest()


def schema(kind: type) -> dict[str, Any]:
    """JSON schema (2020-12) of a kind of document, for readers in other languages."""
    listed = _adapter(kind).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **listed["items"], "$defs": listed["$defs"]}


def _adapter(kind: Any) -> TypeAdapter[Any]:
    # A list of one: pydantic hands settings down to plain dataclasses, but takes none for a dataclass on its own.
    return TypeAdapter(Annotated[list[kind], Field(min_length=1, max_length=1)], config=STRICT)


def _valid(listed: bytes, kind: type[T], where: str) -> T:
    try:
        document: T = _adapter(kind).validate_json(listed)[0]
    except ValidationError as e:
        problems = [f"{_dotted(error['loc'][1:])}: {error['msg']}" for error in e.errors(include_input=False)]
        raise _refused(where, kind, problems) from None  # the cause would print what the document holds
    if blank := list(_blanks(document)):
        raise _refused(where, kind, [f"{name}: is blank, and the result could not be identified" for name in blank])
    return document


def _refused(where: str, kind: type, problems: Sequence[str]) -> DataError:
    lines = "".join(f"\n  {problem}" for problem in problems)
    return DataError(
        f"{where} is not a valid {kind.__name__.lower()}, {len(problems)} problem(s):{lines}",
        hint="remake it: dvc repro --force",
    )


def _blanks(value: object, path: tuple[str | int, ...] = ()) -> Iterator[str]:
    if is_dataclass(value):
        for field in fields(value):
            inner = getattr(value, field.name)
            if field.name in IDENTIFYING.get(type(value), ()) and _blank(inner):
                yield _dotted((*path, field.name))
            yield from _blanks(inner, (*path, field.name))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _blanks(inner, (*path, i))


def _blank(value: object) -> bool:
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Mapping):
        return not value or any(map(_blank, value.values()))
    return isinstance(value, Sequence) and (not value or any(map(_blank, value)))


def _dotted(location: Sequence[str | int]) -> str:
    return ".".join(map(str, location)) or "(top)"

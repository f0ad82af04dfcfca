"""Tables, lines and JSON on disk: atomic writes, and the same bytes for the same content."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from glob import escape, glob
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from deleatur.errors import LFS_POINTER, DataError, SettingsError
from deleatur.storage.git import first_tracked_file

T = TypeVar("T")

UNREADABLE_PARQUET = (pa.ArrowException, OSError, KeyError)
"""What pyarrow raises for files that are not Parquet, are damaged (OSError), or lack a column (KeyError)."""


RECOMPUTE_HINT = "dvc repro (runs the stages whose outputs are missing, damaged or out of date)"
"""For files that stages write."""
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO})


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raises what libraries raise for a full or read-only disk as OSError with its number, and a path for messages.

    safetensors, pyarrow and shutil have the number in their text only, and a failing write names no file.
    """
    try:
        yield
    except (SafetensorError, OSError) as e:
        number = getattr(e, "errno", None) or disk_error_number(str(e))
        if number in DISK_ERRORS and not getattr(e, "filename", None):
            raise OSError(number, os.strerror(number), str(path)) from e
        raise


def disk_error_number(text: str) -> int | None:
    """The operating system's number of a full or read-only disk in the text of an error."""
    numbers = map(int, re.findall(r"(?:os error|Errno) (\d+)", text))
    return next((number for number in numbers if number in DISK_ERRORS), None)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; when the block succeeds, the file there replaces `path` atomically.

    It is synced before, so that after a power failure `path` holds either the old or the complete new content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with disk_errors(path):
            yield partial
            with partial.open("rb") as file:
                os.fsync(file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def empty_folder(folder: Path) -> Path:
    """Deletes the content of a folder, or creates it. Raises SettingsError if git tracks files in it."""
    keep_only(folder, [])
    return folder


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty temporary folder; when the block succeeds, it replaces `folder`, which until then stays as it is.

    Raises SettingsError if git tracks files in the folder, or it is a mount point, which cannot be replaced.
    """
    require_untracked(folder)
    if folder.is_mount():
        raise SettingsError(
            f"{folder} is a mount point, and a stage replaces this folder as a whole",
            hint=f"mount the disk at {folder.absolute().parent} instead, or name a folder inside {folder} in the "
            "section paths of params.yaml, then: deleatur check",
        )
    for leftover in folder.parent.glob(f".{folder.name}.*.partial"):  # of killed processes
        shutil.rmtree(leftover)
    partial, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}.partial") for kind in ("new", "old"))
    partial.mkdir(parents=True)
    try:
        with disk_errors(folder):
            yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    finally:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


def keep_only(folder: Path, keep: Collection[Path]) -> None:
    """Deletes everything in the folder but `keep`, including temporary files of killed processes."""
    require_untracked(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in set(folder.iterdir()).difference(keep):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def require_untracked(folder: Path) -> None:
    """Raises SettingsError if git tracks files in a folder that a stage is about to empty."""
    if folder.is_dir() and (tracked_file := first_tracked_file(folder)):
        raise SettingsError(
            f"a stage empties {folder}, where git tracks {tracked_file}",
            hint="name another folder in the section paths of params.yaml, then: deleatur check",
        )


def matching_files(pattern: str) -> list[Path]:
    """The files that a glob pattern matches, sorted by name; ** matches any number of folders.

    Brackets in the name of an existing file or folder are part of its name, elsewhere of a pattern. Links to missing
    files are included.
    """
    folder = literal_path(pattern)
    rest = Path(pattern).parts[len(folder.parts) :]
    paths = map(Path, glob(str(Path(escape(str(folder)), *rest)), recursive=True))
    return sorted(path for path in paths if path.is_file() or not path.exists())


def literal_path(pattern: str) -> Path:
    """The longest leading path of a glob pattern without wildcards: all its matches are in that folder, or below."""
    path, rest = Path(), Path(pattern).parts
    while rest and (escape(rest[0]) == rest[0] or (path / rest[0]).exists()):
        path, rest = path / rest[0], rest[1:]
    return path


def write_table(path: Path, frame: pd.DataFrame, schema: pa.Schema) -> None:
    """Writes Parquet with exactly the columns of the schema; an empty table keeps its types."""
    table = pa.Table.from_pandas(frame, schema=schema, preserve_index=False)
    with atomic_write(path) as partial:
        # Without pandas' metadata, which contains its version: equal tables give equal bytes.
        pq.write_table(table.replace_schema_metadata(None), partial, compression="zstd")


def read_table(path: Path, schema: pa.Schema | None = None) -> pd.DataFrame:
    """Reads Parquet. Lists become arrays; missing numbers and booleans NaN or None.

    Raises DataError for a table that is damaged, or lacks columns of the schema.
    """
    require_file(path)
    try:
        frame: pd.DataFrame = pq.read_table(path).to_pandas()
    except UNREADABLE_PARQUET as e:
        raise DataError(f"{path} is not an intact Parquet table: {e}", hint=RECOMPUTE_HINT) from e
    if missing := [name for name in (schema.names if schema else ()) if name not in frame]:
        raise DataError(
            f"{path} lacks the columns {', '.join(missing)}: another version of deleatur wrote it", hint=RECOMPUTE_HINT
        )
    return frame


def require_no_pointer(path: Path) -> None:
    """Raises DataError for a file that was never downloaded, whose place a pointer of Git LFS takes."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise DataError(f"{path} is a pointer of Git LFS, not the file", hint=f"git -C {path.parent} lfs pull")


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Writes CSV without the index, lines ending in "\\n", atomically."""
    with atomic_write(path) as partial:
        frame.to_csv(partial, index=False, lineterminator="\n")


def read_csv(path: Path) -> pd.DataFrame:
    """Reads every cell as text, an empty one as "": a prompt "None" or "007" is not converted.

    Raises DataError for anything but UTF-8 with commas and the header's number of fields in every row.
    """
    require_file(path, "put it there or correct the path in params.yaml, then: deleatur check")
    require_no_pointer(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header, *rows = (row for row in csv.reader(file, strict=True) if row)
    except (ValueError, csv.Error) as e:  # UnicodeDecodeError is a ValueError, and so is an empty file
        raise DataError(f"{path} is not a CSV table in UTF-8: {e}", hint="deleatur check") from e
    hint = "save it as CSV in UTF-8, separated by commas, then: deleatur check"
    if len(header) == 1 and (separator := next((c for c in ";\t|" if c in header[0]), None)):
        raise DataError(f"{path}: expected columns separated by commas, got {separator!r}", hint=hint)
    if len(set(header)) < len(header):
        raise DataError(f"{path}: expected every column once, got {', '.join(header)}", hint=hint)
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise DataError(f"{path}, row {number}: expected {len(header)} fields, got {len(row)}", hint=hint)
        if any("\0" in cell for cell in row):
            raise DataError(f"{path}, row {number}: expected text, got a NUL byte", hint=hint)
    return pd.DataFrame(rows, columns=header, dtype=str)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON, keys in their order. Raises ValueError for NaN, which is not JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as partial:
        partial.write_text(text + "\n", "utf-8")


def read_json(path: Path, hint: str = RECOMPUTE_HINT) -> Any:
    """Reads JSON of any type; `read_json_as` validates it. Raises DataError if the file is missing or not JSON."""
    require_file(path, hint)
    return parse_json(path.read_bytes(), Any, str(path), hint)


def read_json_as(path: Path, expected: type[T], hint: str = RECOMPUTE_HINT) -> T:
    """Reads JSON of a type: a dataclass, or a container of some. Raises DataError, see `parse_json`."""
    require_file(path, hint)
    value: T = parse_json(path.read_bytes(), expected, str(path), hint)
    return value


def read_object(path: Path, *keys: str, hint: str = RECOMPUTE_HINT) -> dict[str, Any]:
    """Reads a JSON object. Raises DataError for anything else, or if a key is missing."""
    value = read_json_as(path, dict[str, Any], hint)
    if missing := [key for key in keys if key not in value]:
        raise DataError(f"{path} lacks {', '.join(missing)}: another version or setting wrote it", hint=hint)
    return value


def parse_json(data: bytes | str, expected: Any, source: str, hint: str = RECOMPUTE_HINT) -> Any:
    """The value of a JSON text. Keys beyond the fields of a dataclass are left out.

    Raises DataError naming `source` and what is missing or of another type; nothing is converted.
    """
    try:
        return TypeAdapter(expected).validate_json(data, strict=True)
    except ValidationError as e:
        first, *others = e.errors(include_url=False)
        if first["type"] == "json_invalid":
            raise DataError(f"{source} is not JSON in UTF-8: {first['msg']}", hint=hint) from None
        got = "" if first["type"] == "missing" else f", got {type(first['input']).__name__}"
        place = "".join(f" {name}:" for name in [".".join(map(str, first["loc"]))] if name)
        more = f" ({len(others)} more)" if others else ""
        raise DataError(f"{source}:{place} {first['msg']}{got}{more}: another version wrote it", hint=hint) from None


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes lines in UTF-8, atomically."""
    with atomic_write(path) as partial:
        partial.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def read_lines(path: Path) -> Iterator[bytes]:
    """Lines as bytes: the caller decides what to do with a line that is not UTF-8."""
    require_file(path, f"ls {path.parent}")
    with path.open("rb") as file:
        yield from file


def require_file(path: Path, hint: str = RECOMPUTE_HINT) -> None:
    """Raises DataError if there is no such file, or a folder in its place."""
    if path.is_dir():
        raise DataError(f"expected a file, and {path} is a folder", hint=f"mv {path} {path}.folder, then: {hint}")
    if not path.is_file():
        raise DataError(f"no file {path}", hint=hint)

"""Tables, lines and JSON on disk. Written whole or not at all, and the same bytes for the same content."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from deleatur.errors import DataError, SettingsError
from deleatur.storage.dvc import tracked


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place to write; what lies there takes the name `path` at once, and only if the block ends well.

    It is on the disk by then: a machine that goes down leaves what was there before, or the whole of what is new.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def emptied(folder: Path) -> Path:
    """The folder, with nothing in it. Raises SettingsError where git keeps files there, which a stage never makes."""
    if folder.exists():
        demand_free(folder)
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def keep_only(folder: Path, wanted: Collection[Path]) -> None:
    """Deletes whatever else lies in the folder, what a killed process left half written included."""
    demand_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in set(folder.iterdir()).difference(wanted):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def demand_free(folder: Path) -> None:
    """Raises SettingsError where git keeps files in what a stage is about to empty."""
    if folder.is_dir() and (kept := tracked(folder)):
        raise SettingsError(
            f"a stage empties {folder}, and git keeps {kept} there",
            hint="name another folder in the section paths of params.yaml, then: deleatur check",
        )


def write_table(path: Path, frame: pd.DataFrame, schema: pa.Schema) -> None:
    """Parquet with exactly the schema's columns; an empty table keeps its types."""
    table = pa.Table.from_pandas(frame, schema=schema, preserve_index=False)
    with replacing(path) as partial:
        # Without the notes of pandas, which name its version: content alone decides the bytes.
        pq.write_table(table.replace_schema_metadata(None), partial, compression="zstd")


def read_table(path: Path) -> pd.DataFrame:
    """Lists come as arrays, a missing number or truth value as NaN or None."""
    _there(path)
    try:
        frame: pd.DataFrame = pq.read_table(path).to_pandas()
    except pa.ArrowException as e:
        raise DataError(f"{path} is not a Parquet table: {e}", hint="dvc repro") from e
    return frame


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    with replacing(path) as partial:
        frame.to_csv(partial, index=False, lineterminator="\n")


def read_csv(path: Path) -> pd.DataFrame:
    """Everything as text, an empty cell as an empty text: a prompt "None" or "007" stays what it is."""
    _there(path)
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (ValueError, pd.errors.ParserError) as e:  # UnicodeDecodeError and EmptyDataError are ValueErrors
        raise DataError(f"{path} is not a CSV table in UTF-8: {e}", hint="deleatur check") from e


def write_json(path: Path, value: Any) -> None:
    """Indented, in the order given; NaN is refused because it is not JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with replacing(path) as partial:
        partial.write_text(text + "\n", "utf-8")


def read_json(path: Path) -> Any:
    _there(path)
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as e:
        raise DataError(f"{path} is not JSON in UTF-8: {e}", hint="dvc repro") from e


def write_lines(path: Path, lines: Iterable[str]) -> None:
    with replacing(path) as partial:
        partial.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def read_lines(path: Path) -> Iterator[bytes]:
    """Line by line, as bytes: what is not UTF-8 is the reader's finding, not a crash."""
    _there(path)
    with path.open("rb") as file:
        yield from file


def _there(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"no file {path}", hint="dvc status")

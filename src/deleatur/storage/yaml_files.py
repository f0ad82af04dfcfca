"""Reads YAML files; an error names the line, and a merge conflict as its cause."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from deleatur.errors import DataError, DeleaturError

CONFLICT_MARKER = re.compile(r"^(<{7}|>{7}) ", re.MULTILINE)
"""What git writes into a file with a merge conflict: <<<<<<< OURS and >>>>>>> THEIRS."""


def read_yaml(path: Path, error: type[DeleaturError] = DataError, again: str = "the same command again") -> Any:
    """The content of a YAML file. Raises `error` naming file and line, with `again` as the last step of the hint."""
    text = ""
    try:
        text = path.read_text("utf-8")
        return yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as e:  # ValueError: not UTF-8, or a date that does not exist
        if marker := CONFLICT_MARKER.search(text):
            line = text.count("\n", 0, marker.start()) + 1
            message = f"{path}, line {line}: expected YAML, got an unresolved merge conflict of git ({marker[1]})"
            raise error(message, hint=f"{_resolve_command(path)}, then: {again}") from e
        raise error(f"{path} is not YAML in UTF-8: {e}", hint=f"correct {path}, then: {again}") from e


def _resolve_command(path: Path) -> str:
    if path.name == "dvc.lock":  # DVC writes it anew for whatever has changed
        return f"git checkout HEAD -- {path}"
    return f"keep one side of it and delete the markers, git add {path}"

"""Reads YAML files; an error names the line, and a merge conflict as its cause."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from deleatur.errors import DataError, DeleaturError

FAST_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Several times as fast as SafeLoader, where PyYAML was built with libyaml."""
CONFLICT_MARKER = re.compile(r"^(<{7}|>{7}) ", re.MULTILINE)
"""What git writes into a file with a merge conflict: <<<<<<< OURS and >>>>>>> THEIRS."""


def read_yaml(path: Path, error: type[DeleaturError] = DataError, again: str = "the same command again") -> Any:
    """The content of a YAML file. Raises `error` naming file and line, with `again` as the last step of the hint."""
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as e:
        raise error(f"{path} is not YAML in UTF-8: {e}", hint=f"correct {path}, then: {again}") from e
    return parse_yaml(
        text, str(path), error, f"correct {path}, then: {again}", f"{_resolve_command(path)}, then: {again}"
    )


def parse_yaml(
    text: str, source: str, error: type[DeleaturError] = DataError, hint: str = "", conflict_hint: str = ""
) -> Any:
    """The content of a YAML text. Raises `error` naming its source and the line."""
    try:
        return _load(text)
    except (ValueError, yaml.YAMLError) as e:  # ValueError: a date that does not exist
        if marker := CONFLICT_MARKER.search(text):
            line = text.count("\n", 0, marker.start()) + 1
            message = f"{source}, line {line}: expected YAML, got an unresolved merge conflict of git ({marker[1]})"
            raise error(message, hint=conflict_hint or hint) from e
        raise error(f"{source} is not YAML: {e}", hint=hint) from e


def _load(text: str) -> Any:
    with suppress(ValueError, yaml.YAMLError):
        return yaml.load(text, FAST_LOADER)
    return yaml.safe_load(text)  # its errors quote the line


def nested_mapping(value: Any, *keys: str) -> Mapping[str, Any]:
    """The mapping below these keys of an unvalidated value; empty if there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _resolve_command(path: Path) -> str:
    if path.name == "dvc.lock":  # DVC writes it anew for whatever has changed
        return f"git checkout HEAD -- {path}"
    return f"keep one side of it and delete the markers, git add {path}"

"""Accepts only files that cannot execute code when they are loaded, by content: safetensors, and text."""

from __future__ import annotations

import codecs
from pathlib import Path

from safetensors import SafetensorError, safe_open

from deleatur.errors import ModelError

CHUNK_SIZE = 1 << 20


def require_safe_file(path: Path) -> None:
    """Raises ModelError unless the file is complete safetensors, by its suffix, or text.

    The content is checked, because a pickle can have any name, and loading it executes it.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="numpy"):  # checks the header, and the file's length against it
                return
        except SafetensorError as e:
            raise _unsafe(path, f"not safetensors, despite its name: {e}") from e
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_SIZE):
                if "\0" in decoder.decode(chunk):
                    raise _unsafe(path, "neither safetensors nor text")
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as e:
        raise _unsafe(path, "neither safetensors nor text") from e


def _unsafe(path: Path, problem: str) -> ModelError:
    return ModelError(f"{path} is {problem}: it is not loaded", hint="deleatur history (who made this version)")

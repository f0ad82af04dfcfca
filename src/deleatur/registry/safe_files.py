"""What a file is, by its content. Only what cannot run when it is read is let through: safetensors, and text."""

from __future__ import annotations

import codecs
from pathlib import Path

from safetensors import SafetensorError, safe_open

from deleatur.errors import ModelError

CHUNK = 1 << 20


def demand_plain(path: Path) -> None:
    """Raises ModelError unless the file is what its name says: whole safetensors, or text. A name proves nothing: a
    pickle can be called anything, and whoever loads it runs it.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="numpy"):  # reads the header, and that as many bytes follow as it says
                return
        except SafetensorError as e:
            raise _refused(path, f"no safetensors, whatever its name says: {e}") from e
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                if "\0" in decoder.decode(chunk):
                    raise _refused(path, "neither safetensors nor text")
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as e:
        raise _refused(path, "neither safetensors nor text") from e


def _refused(path: Path, what: str) -> ModelError:
    return ModelError(f"{path} is {what}: it is not loaded", hint="deleatur history (who made this version, and when)")

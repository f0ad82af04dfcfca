"""What can go wrong, and the exit code that says so.

DeleaturError                 1   anything below that has no code of its own
├── SettingsError             2   params.yaml: unknown key, wrong value, missing section
├── DataError                 3   feedback, prompts or pictures are missing or do not fit
├── ModelError                4   a network cannot be loaded, or its digest is not the expected one
├── ErasureRefused            5   the run did nothing, or destroyed the model: no candidate is written
├── ServiceError              6   a store, tracker or scheduler did not answer; worth trying again
└── ContinueMe               75   stopped on request, state saved: run the same command to go on

`deleatur demo` and `deleatur explain` also end with the verdict: 0 pass, 10 fail, 11 not enough evidence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class DeleaturError(Exception):
    """What was expected, what came, and what to do: `hint` is the next command worth typing."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class SettingsError(DeleaturError):
    exit_code = 2


class DataError(DeleaturError):
    exit_code = 3


class ModelError(DeleaturError):
    exit_code = 4


class ErasureRefused(DeleaturError):
    exit_code = 5


class ServiceError(DeleaturError):
    exit_code = 6


class ContinueMe(DeleaturError):
    exit_code = 75


@contextmanager
def at(where: str) -> Iterator[None]:
    """Errors inside say what they are about: a setting, a concept."""
    try:
        yield
    except DeleaturError as e:
        raise type(e)(f"{where}: {e}", hint=e.hint) from e

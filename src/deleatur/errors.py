"""The error classes and their exit codes.

DeleaturError                 1   any of the below that defines no code of its own
├── SettingsError             2   params.yaml: unknown key, wrong value, missing section
├── DataError                 3   feedback, prompts or images are missing or invalid
├── ModelError                4   a network cannot be loaded, or its digest is not the expected one
├── ErasureRefused            5   training had no effect, or destroyed the model: no candidate is written
├── ServiceError              6   a store, tracker or scheduler did not answer; a retry may succeed
└── Interrupted              75   stopped on request with its state saved: run the same command to resume

`deleatur demo` and `deleatur explain` also exit with the verdict: 0 pass, 10 fail, 11 not enough evidence.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from deleatur.redaction import redact

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import Tensor


LFS_POINTER = b"version https://git-lfs"
"""How a file begins that was never downloaded: a pointer of Git LFS takes its place."""


class DeleaturError(Exception):
    """The message says what was expected and what was found; `hint` is the command to run next. Both are redacted."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(redact(message))
        self.hint = redact(hint)


class SettingsError(DeleaturError):
    exit_code = 2


class DataError(DeleaturError):
    exit_code = 3


class ModelError(DeleaturError):
    exit_code = 4


class ErasureRefused(DeleaturError):
    """`record` and `weights` are for inspection: evaluations and curve of the run, and the weight differences."""

    exit_code = 5

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        record: Mapping[str, Any] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.record, self.weights = record or {}, weights or {}


class ServiceError(DeleaturError):
    exit_code = 6


class Interrupted(DeleaturError):
    exit_code = 75


@contextmanager
def error_context(subject: str) -> Iterator[None]:
    """Prefixes the messages of errors raised inside with their subject: a setting, a concept."""
    try:
        yield
    except DeleaturError as e:
        raise type(e)(f"{subject}: {e}", hint=e.hint) from e

"""The folder is the registry: one file in a shelf's folder is one method, named after the file."""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module
from pathlib import Path
from typing import TypeVar

from deleatur.errors import SettingsError

T = TypeVar("T")

SHELVES = ("erasers", "guides", "detectors", "metrics", "attacks", "inversion")


def names(shelf: str) -> list[str]:
    """The methods on a shelf, without importing any of it."""
    return sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).with_name(shelf))]))


def find(shelf: str, name: str, base: type[T]) -> type[T]:
    """The one final class of `base` that the file `shelf/name.py` defines.

    Raises SettingsError, naming what there is, when the shelf has no such file.
    """
    if name not in names(shelf):
        listed = ", ".join(names(shelf))
        raise SettingsError(f"no {name!r} among {shelf}: there is {listed}", hint=f"deleatur methods {shelf}")
    module = import_module(f"deleatur.{shelf}.{name}")
    own = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    [found] = [c for c in own if issubclass(c, base)]
    return found

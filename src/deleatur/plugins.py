"""The folder is the registry: one file in a shelf's folder is one method, named after the file.

Packages add methods of their own by entry points of the group `deleatur.SHELF`, each a name and the module it is in.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module, invalidate_caches
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from deleatur.errors import SettingsError

T = TypeVar("T")

SHELVES = ("erasers", "guides", "detectors", "metrics", "attacks", "inversion")
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Method:
    """One method of a shelf. Nothing of it is imported yet."""

    shelf: str
    name: str
    module: str
    package: str = ""
    """The package that brings it; empty: it is one of ours."""
    version: str = ""
    source: Path = HERE
    """Where the code of ours lies."""

    @property
    def origin(self) -> str:
        return f"{self.package} {self.version}" if self.package else "deleatur"

    def code(self) -> list[str]:
        """All text that decides what it does: of ours its file; of a package its version and every file of it, since
        nobody knows which of them the method reads.
        """
        if not self.package:
            return [(self.source / self.shelf / f"{self.name}.py").read_text("utf-8")]
        return [self.version, *(path.read_text("utf-8", errors="replace") for path in self._files())]

    def _files(self) -> Iterator[Path]:
        spec = find_spec(self.module.partition(".")[0])
        folders = (spec and spec.submodule_search_locations) or ()
        yield from (path for folder in folders for path in sorted(Path(folder).rglob("*.py")))
        if spec and spec.origin and not folders:
            yield Path(spec.origin)

    def broken(self, why: str) -> SettingsError:
        return SettingsError(
            f"{self.name!r} among {self.shelf}, of the package {self.origin}, does not load: {why}",
            hint=f"mend or uninstall {self.package}, then: deleatur methods {self.shelf}",
        )


@cache
def _shelf(shelf: str, source: Path = HERE) -> dict[str, list[Method]]:
    """What there is under each name; more than one where packages contradict each other."""
    found: dict[str, list[Method]] = {}
    for own in pkgutil.iter_modules([str(source / shelf)]):
        found[own.name] = [Method(shelf, own.name, f"deleatur.{shelf}.{own.name}", source=source)]
    for point in sorted(entry_points(group=f"deleatur.{shelf}"), key=lambda p: (p.name, p.dist and p.dist.name)):
        if point.dist:
            method = Method(shelf, point.name, point.module, point.dist.name, point.dist.version)
            found.setdefault(point.name, []).append(method)
    return found


def names(shelf: str, source: Path = HERE) -> list[str]:
    """The methods on a shelf, without importing any of it."""
    return sorted(_shelf(shelf, source))


def method(shelf: str, name: str, source: Path = HERE) -> Method:
    """Raises SettingsError where there is none of that name, or more than one."""
    found = _shelf(shelf, source).get(name, [])
    if not found:
        listed = ", ".join(names(shelf, source))
        raise SettingsError(f"no {name!r} among {shelf}: there is {listed}", hint=f"deleatur methods {shelf}")
    if len(found) > 1:
        claimed = " and ".join(m.origin for m in found)
        raise SettingsError(
            f"{name!r} among {shelf} is a method of {claimed}: one of them has to go",
            hint=f"pip uninstall {found[-1].package}",
        )
    return found[0]


def find(shelf: str, name: str, base: type[T]) -> type[T]:
    """The one final class of `base` that the method's module defines.

    Raises SettingsError, naming what there is, when the shelf has no such method, or when a package's does not load.
    """
    one = method(shelf, name)
    try:
        module = import_module(one.module)
    except Exception as e:  # whatever a stranger's file does
        if one.package:
            raise one.broken(f"{type(e).__name__}: {e}") from e
        raise
    own = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    found = [c for c in own if issubclass(c, base)]
    if len(found) != 1 and one.package:
        raise one.broken(f"{one.module} has to define one class derived from {base.__name__}, and defines {len(found)}")
    [only] = found
    return only


def brought(module: str) -> Method | None:
    """The method of another package that lies in this module, if any."""
    return next((m for m in foreign() if m.module == module), None)


def foreign() -> list[Method]:
    """Every method that another package brings."""
    return [m for shelf in SHELVES for found in _shelf(shelf).values() for m in found if m.package]


def refresh() -> None:
    """A process that has run for weeks sees what was installed meanwhile."""
    invalidate_caches()
    _shelf.cache_clear()

"""Plug-in discovery: each file in the folder of a kind is one plug-in, named after the file.

Other packages add plug-ins by entry points of the group `deleatur.KIND`, whose values are module names.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module, invalidate_caches
from importlib.metadata import Distribution, EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from deleatur.errors import SettingsError

T = TypeVar("T")

BASES = {
    "erasers": "Eraser",
    "guides": "Guide",
    "detectors": "Detector",
    "metrics": "Metric",
    "attacks": "Attack",
    "inversion": "Inverter",
}
"""Plug-in kind → the class that its plug-ins are derived from, in the package `deleatur.KIND`."""
KINDS = tuple(BASES)
PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Plugin:
    """The address of one plug-in. Nothing of it is imported yet."""

    kind: str
    name: str
    module: str
    package: str = ""
    """The distribution that provides it; empty for built-in plug-ins."""
    version: str = ""
    source: Path = PACKAGE
    """Folder of the package `deleatur`, for built-in plug-ins."""

    @property
    def origin(self) -> str:
        return f"{self.package} {self.version}" if self.package else "deleatur"

    def code(self) -> list[str]:
        """The texts that determine its behaviour: a built-in plug-in's file; otherwise the version and all Python files
        of its top-level package, since which of them it uses is unknown.
        """
        if not self.package:
            return [(self.source / self.kind / f"{self.name}.py").read_text("utf-8")]
        return [self.version, *(path.read_text("utf-8", errors="replace") for path in self._files())]

    def _files(self) -> Iterator[Path]:
        spec = find_spec(self.module.partition(".")[0])
        folders = (spec and spec.submodule_search_locations) or ()
        yield from (path for folder in folders for path in sorted(Path(folder).rglob("*.py")))
        if spec and spec.origin and not folders:
            yield Path(spec.origin)

    def load_error(self, cause: str) -> SettingsError:
        return SettingsError(
            f"{self.name!r} among {self.kind}, of the package {self.origin}, does not load: {cause}",
            hint=f"fix or uninstall {self.package}, then: deleatur methods {self.kind}",
        )


@cache
def _entry_points() -> list[tuple[EntryPoint, Distribution]]:
    """Those of plug-ins in all installed packages, whose metadata takes longest to read; by name, then package."""
    groups: Any = entry_points()  # before Python 3.12 of a type whose `select` mypy does not know
    points = [point for kind in KINDS for point in groups.select(group=f"deleatur.{kind}")]
    return sorted(((p, p.dist) for p in points if p.dist), key=lambda pair: (pair[0].name, pair[1].name))


@cache
def _plugins(kind: str, source: Path = PACKAGE) -> dict[str, list[Plugin]]:
    """Name → plug-ins; more than one where packages conflict."""
    plugins: dict[str, list[Plugin]] = {}
    for module in pkgutil.iter_modules([str(source / kind)]):
        plugins[module.name] = [Plugin(kind, module.name, f"deleatur.{kind}.{module.name}", source=source)]
    for point, dist in _entry_points():
        if point.group == f"deleatur.{kind}":
            plugin = Plugin(kind, point.name, point.module, dist.name, dist.version)
            plugins.setdefault(point.name, []).append(plugin)
    return plugins


def names(kind: str, source: Path = PACKAGE) -> list[str]:
    """Names of all plug-ins of a kind. Imports none of them."""
    return sorted(_plugins(kind, source))


def get(kind: str, name: str, source: Path = PACKAGE) -> Plugin:
    """The plug-in of that name. Raises SettingsError when there is none, or more than one."""
    candidates = _plugins(kind, source).get(name, [])
    if not candidates:
        listed = ", ".join(names(kind, source))
        raise SettingsError(f"no {name!r} among {kind}: expected one of {listed}", hint=f"deleatur methods {kind}")
    if len(candidates) > 1:
        origins = " and ".join(plugin.origin for plugin in candidates)
        raise SettingsError(
            f"{name!r} among {kind} is provided by {origins}: expected one of them",
            hint=f"pip uninstall {candidates[-1].package}",
        )
    return candidates[0]


def base(kind: str) -> type[BaseModel]:
    """The class that plug-ins of a kind are derived from."""
    base_class: type[BaseModel] = getattr(import_module(f"deleatur.{kind}"), BASES[kind])
    return base_class


def load(kind: str, name: str, base: type[T]) -> type[T]:
    """The one subclass of `base` that the plug-in's module defines.

    Raises SettingsError when there is no such plug-in, or when another package's does not load.
    """
    plugin = get(kind, name)
    try:
        module = import_module(plugin.module)
    except Exception as e:  # code of other packages may raise anything
        if plugin.package:
            raise plugin.load_error(f"{type(e).__name__}: {e}") from e
        raise
    defined = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    classes = [c for c in defined if issubclass(c, base)]
    if len(classes) != 1 and plugin.package:
        raise plugin.load_error(
            f"{plugin.module} has to define one class derived from {base.__name__}, and defines {len(classes)}"
        )
    [cls] = classes
    return cls


def external_plugin(module: str) -> Plugin | None:
    """The plug-in of another package that this module defines, if any."""
    return next((plugin for plugin in external() if plugin.module == module), None)


def external() -> list[Plugin]:
    """All plug-ins of other packages."""
    return [p for kind in KINDS for candidates in _plugins(kind).values() for p in candidates if p.package]


def refresh() -> None:
    """Clears the caches, so that a long-running process sees newly installed packages."""
    invalidate_caches()
    _entry_points.cache_clear()
    _plugins.cache_clear()

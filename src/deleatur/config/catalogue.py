"""Every installed plug-in with its hyperparameters, as `deleatur methods` lists them."""

from __future__ import annotations

import sys
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from deleatur import plugins
from deleatur.config.descriptions import description
from deleatur.errors import SettingsError


def catalogue(kind: str | None) -> dict[str, dict[str, Any]]:
    """Kind → plug-in → source, package and hyperparameters. None: of every kind. Raises SettingsError."""
    if kind is not None and kind not in plugins.KINDS:
        raise SettingsError(
            f"expected a kind of plug-in ({', '.join(plugins.KINDS)}), got {kind!r}", hint="deleatur methods"
        )
    return {k: {n: _describe(k, n) for n in plugins.names(k)} for k in plugins.KINDS if kind in (None, k)}


def _describe(kind: str, name: str) -> dict[str, Any]:
    plugin = plugins.load(kind, name, plugins.base(kind))
    source = next(iter((sys.modules[plugin.__module__].__doc__ or "").strip().splitlines()), "")
    return {
        "source": source,
        "package": plugins.get(kind, name).origin,
        "hyperparameters": hyperparameters(plugin),
    }


def hyperparameters(model: type[BaseModel], prefix: str = "") -> dict[str, dict[str, Any]]:
    """Dotted name → default, choices and meaning, those of nested models included."""
    fields: dict[str, dict[str, Any]] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            fields |= hyperparameters(field.annotation, f"{prefix}{name}.")
        else:
            fields[prefix + name] = {
                "default": "required" if field.is_required() else field.get_default(call_default_factory=True),
                "choices": _choices(field.annotation) or None,
                "meaning": description(model, name),
            }
    return fields


def _choices(annotation: Any) -> list[str]:
    """Of a Literal, optional or not."""
    return [c for a in (annotation, *get_args(annotation)) if get_origin(a) is Literal for c in get_args(a)]

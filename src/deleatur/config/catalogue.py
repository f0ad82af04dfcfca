"""Every method of every plug-in registry, with its hyperparameters."""

from __future__ import annotations

import sys
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from deleatur import plugins
from deleatur.attacks import Attack
from deleatur.detectors import Detector
from deleatur.erasers import Eraser
from deleatur.errors import SettingsError
from deleatur.guides import Guide
from deleatur.inversion import Inverter
from deleatur.metrics import Metric

SHELVES: dict[str, type[BaseModel]] = {
    "erasers": Eraser,
    "inversion": Inverter,
    "guides": Guide,
    "detectors": Detector,
    "metrics": Metric,
    "attacks": Attack,
}


def catalogue(shelf: str | None) -> dict[str, dict[str, Any]]:
    """Shelf → method → its source line and its numbers with defaults and meanings."""
    if shelf is not None and shelf not in SHELVES:
        raise SettingsError(f"no shelf {shelf!r}: there is {', '.join(SHELVES)}", hint="deleatur methods")
    return {s: {n: _entry(s, n) for n in plugins.names(s)} for s in SHELVES if shelf in (None, s)}


def _entry(shelf: str, name: str) -> dict[str, Any]:
    found = plugins.find(shelf, name, SHELVES[shelf])
    source = next(iter((sys.modules[found.__module__].__doc__ or "").strip().splitlines()), "")
    return {"source": source, "package": plugins.method(shelf, name).origin, "numbers": _numbers(found)}


def _numbers(of: type[BaseModel], prefix: str = "") -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for name, field in of.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            out |= _numbers(field.annotation, f"{prefix}{name}.")
        else:
            out[prefix + name] = {
                "default": "required" if field.is_required() else field.get_default(call_default_factory=True),
                "choices": _choices(field.annotation) or None,
                "meaning": _meaning(of, name),
            }
    return out


def _choices(annotation: Any) -> list[str]:
    """Of a Literal, also of one that may be left out."""
    return [c for a in (annotation, *get_args(annotation)) if get_origin(a) is Literal for c in get_args(a)]


def _meaning(of: type[BaseModel], name: str) -> str:
    """A method that gives a number a default of its own need not say again what the number is."""
    fields = (c.model_fields[name] for c in of.__mro__ if issubclass(c, BaseModel) and name in c.model_fields)
    return next((f.description for f in fields if f.description), "")

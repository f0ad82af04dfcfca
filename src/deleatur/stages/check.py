"""What can be known before anything runs: do the settings name things that exist, with numbers that fit?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from deleatur import plug
from deleatur.attacks import Attack
from deleatur.detectors import Detector
from deleatur.erasers import Eraser
from deleatur.errors import DataError, SettingsError
from deleatur.guides import Guide
from deleatur.inversion import Inverter
from deleatur.metrics import Metric
from deleatur.settings import Settings
from deleatur.stages import inputs

SHELVES: dict[str, type[BaseModel]] = {
    "erasers": Eraser,
    "inversion": Inverter,
    "guides": Guide,
    "detectors": Detector,
    "metrics": Metric,
    "attacks": Attack,
}


def check(settings: Settings) -> list[str]:
    """What was found in order, a line each. Raises SettingsError or DataError at the first thing that is not."""
    chosen = [
        ("inversion", settings.invert.method, inputs.numbers_of(settings.invert), "invert"),
        ("erasers", settings.erase.method, inputs.numbers_of(settings.erase, "source"), "erase"),
        ("guides", settings.guide.method, inputs.numbers_of(settings.guide), "guide"),
    ]
    chosen += [("attacks", n, numbers, f"attack.methods.{n}") for n, numbers in settings.attack.methods.items()]
    for shelf, section in (("detectors", settings.evaluate.detectors), ("metrics", settings.evaluate.metrics)):
        for name, numbers in section.items():
            if "method" not in numbers:
                raise SettingsError(f"evaluate.{shelf}.{name} names no method", hint=f"deleatur methods {shelf}")
            rest = {k: v for k, v in numbers.items() if k != "method"}
            chosen.append((shelf, numbers["method"], rest, f"evaluate.{shelf}.{name}"))
    for shelf, name, numbers, where in chosen:
        inputs.method(shelf, SHELVES[shelf], name, numbers, where)
    inputs.guide(settings)
    lines = [f"{where}: {name}" for _, name, _, where in chosen]
    for name in settings.targets:
        inputs.inverter(settings, name)
        found = inputs.prompts(settings.concepts[name].prompts, settings.sample.split, name)
        if settings.concepts[name].found.detector not in settings.evaluate.detectors:
            raise SettingsError(f"concepts.{name}.found.detector is not among evaluate.detectors")
        lines.append(f"concepts.{name}: {len(found)} prompts")
    for source in settings.ingest.sources:
        files = sorted(Path().glob(source))
        if not files:
            raise DataError(f"ingest.sources: {source} matches no file", hint="see README.md, Bring your own feedback")
        lines.append(f"ingest.sources: {source}, {len(files)} file(s)")
    _rules(settings)
    lines.append(f"gate: {len(settings.gate.rules)} rules")
    return lines


def _rules(settings: Settings) -> None:
    for name, rule in settings.gate.rules.items():
        if rule.metric not in settings.evaluate.metrics:
            raise SettingsError(f"gate.rules.{name} judges {rule.metric!r}, which is not among evaluate.metrics")


def catalogue(shelf: str | None) -> dict[str, dict[str, Any]]:
    """Shelf → method → its source line and its numbers with defaults and meanings."""
    if shelf is not None and shelf not in SHELVES:
        raise SettingsError(f"no shelf {shelf!r}: there is {', '.join(SHELVES)}", hint="deleatur methods")
    return {s: {n: _entry(s, n) for n in plug.names(s)} for s in SHELVES if shelf in (None, s)}


def _entry(shelf: str, name: str) -> dict[str, Any]:
    found = plug.find(shelf, name, SHELVES[shelf])
    source = (sys.modules[found.__module__].__doc__ or "").strip().splitlines()[0]
    return {"source": source, "numbers": _numbers(found)}


def _numbers(of: type[BaseModel], prefix: str = "") -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for name, field in of.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            out |= _numbers(field.annotation, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else field.get_default(call_default_factory=True)
            out[prefix + name] = {"default": default, "meaning": (field.description or "").split("\n")[0]}
    return out

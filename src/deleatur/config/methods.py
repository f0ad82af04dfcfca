"""Sections of params.yaml → objects of the methods they name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from deleatur import plugins
from deleatur.attacks import Attack
from deleatur.config.settings import Choice, Settings, explain, merged
from deleatur.detectors import Detector
from deleatur.erasers import Eraser
from deleatur.errors import SettingsError
from deleatur.guides import Guide
from deleatur.inversion import Inverter
from deleatur.metrics import Metric

M = TypeVar("M", bound=BaseModel)


PLAIN_GUIDE = "cfg"
"""The guide that plain diffusers draws with."""


def instantiate(shelf: str, base: type[M], name: str, numbers: Mapping[str, Any], where: str) -> M:
    """The method `name` of a shelf with its numbers. Raises SettingsError naming each wrong key."""
    found = plugins.find(shelf, name, base)
    try:
        return found(**numbers)
    except ValidationError as e:
        raise SettingsError(explain(e, where), hint=f"deleatur methods {shelf}") from e


def configured(section: Choice, base: type[M], where: str, name: str | None = None) -> M:
    """The method that a section uses, or the one named, with its numbers."""
    name = name or section.method
    return instantiate(section.shelf, base, name, section.numbers(name), f"{where}.{name}")


def guide(settings: Settings) -> Guide:
    """Raises SettingsError for one that the sampler would finish without."""
    found = configured(settings.guide, Guide, "guide")
    late = {name: found.starts(name) for name in settings.targets if found.starts(name) >= settings.sample.steps}
    if late:
        names, first = ", ".join(late), min(late.values())
        raise SettingsError(
            f"guide ({settings.guide.method}) steers away from {names} from step {first} on (its warm_up), and the "
            f"sampler's steps are 0 to {settings.sample.steps - 1}: it would do nothing",
            hint="lower the guide's warm_up, or raise sample.steps; then: deleatur check",
        )
    return found


def eraser(settings: Settings) -> Eraser:
    """Raises SettingsError also when the method does not fit one of the targets, or the guide."""
    found = configured(settings.erase, Eraser, "erase")
    found.fits(settings.targets)
    if found.one_step is not None and settings.guide.method != PLAIN_GUIDE:
        raise SettingsError(
            f"guide.method: expected {PLAIN_GUIDE}, since what erase.method {settings.erase.method} makes draws in one "
            f"call and nothing can steer it on the way, got {settings.guide.method}",
            hint=f"guide.method: {PLAIN_GUIDE}, or another erase.method; then: deleatur check",
        )
    return found


def requires_custom_sampler(settings: Settings) -> str:
    """What the candidate is drawn with that neither a version nor an export holds; empty: its weights are all."""
    if settings.guide.method != PLAIN_GUIDE:
        return f"the guide {settings.guide.method}"
    return "" if eraser(settings).one_step is None else "a sampler of one step"


def attacks(settings: Settings, one_step: int | None) -> dict[str, Attack]:
    """On weights that `one_step` is said of, as of a Delta. Raises SettingsError for one that has nothing to ask."""
    given = settings.attack.methods
    found = {name: instantiate("attacks", Attack, name, own, f"attack.methods.{name}") for name, own in given.items()}
    if found and one_step is not None:
        raise SettingsError(
            "attack.methods: expected none, since attacks ask what a network says at every noise level, and what the "
            f"eraser makes draws from one alone; got {', '.join(found)}",
            hint="attack: {methods: {}}, or another erase.method; then: deleatur check",
        )
    return found


def inverter(settings: Settings, concept: str, name: str | None = None) -> Inverter:
    """The inversion method with the concept's own numbers over those of `invert`."""
    name, own = name or settings.invert.method, settings.concepts[concept].invert
    numbers = merged(settings.invert.numbers(name), own.get(name, {}))
    return instantiate("inversion", Inverter, name, numbers, f"invert.{name} with concepts.{concept}.invert")


def detectors(settings: Settings) -> dict[str, Detector]:
    return _named("detectors", Detector, settings.evaluate.detectors)


def metrics(settings: Settings) -> dict[str, Metric]:
    return _named("metrics", Metric, settings.evaluate.metrics)


def _named(shelf: str, base: type[M], section: Mapping[str, Mapping[str, Any]]) -> dict[str, M]:
    """Methods that are used several at a time, each under a name of the user's, `method` among its numbers."""
    out = {}
    for name, given in section.items():
        where, numbers = f"evaluate.{shelf}.{name}", dict(given)
        if not isinstance(kind := numbers.pop("method", None), str):
            raise SettingsError(
                f"{where}: expected `method`, one of {shelf}, got {kind!r}", hint=f"deleatur methods {shelf}"
            )
        out[name] = instantiate(shelf, base, kind, numbers, where)
    return out


def in_use(settings: Settings) -> list[plugins.Method]:
    """Every method that the chain runs, each once."""
    named = [(section.shelf, section.method) for section in (settings.invert, settings.erase, settings.guide)]
    named += [("attacks", name) for name in settings.attack.methods]
    for shelf, section in (("detectors", settings.evaluate.detectors), ("metrics", settings.evaluate.metrics)):
        named += [(shelf, numbers["method"]) for numbers in section.values()]
    return [plugins.method(shelf, name) for shelf, name in dict.fromkeys(named)]

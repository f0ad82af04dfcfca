"""Sections of params.yaml → the plug-ins that they select, with their hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from deleatur import plugins
from deleatur.attacks import Attack
from deleatur.config.plugin_config import Hyperparameters, PluginSection
from deleatur.config.settings import Settings, describe_errors, merged
from deleatur.detectors import Detector
from deleatur.erasers import Eraser
from deleatur.errors import SettingsError
from deleatur.guides import Guide
from deleatur.inversion import Inverter
from deleatur.metrics import Metric

P = TypeVar("P", bound=BaseModel)

PLAIN_GUIDE = "cfg"
"""The guide that diffusers' own pipelines sample with."""


def instantiate(kind: str, base: type[P], name: str, config: Mapping[str, Any], where: str) -> P:
    """One plug-in with its hyperparameters. Raises SettingsError naming each wrong key below `where`."""
    try:
        return plugins.load(kind, name, base)(**config)
    except ValidationError as e:
        raise SettingsError(describe_errors(e, where), hint=f"deleatur methods {kind}") from e


def configured(section: PluginSection, base: type[P], where: str, name: str | None = None) -> P:
    """The plug-in that a section selects, or another one that is named, as the section configures it."""
    name = name or section.method
    return instantiate(section.kind, base, name, section.config(name), f"{where}.{name}")


def guide(settings: Settings) -> Guide:
    """Raises SettingsError where the guide would first act after the sampler's last step."""
    guide = configured(settings.guide, Guide, "guide")
    steps = settings.sample.steps
    late = {name: start for name in settings.targets if (start := guide.start_step(name)) >= steps}
    if late:
        names, first = ", ".join(late), min(late.values())
        raise SettingsError(
            f"guide ({settings.guide.method}) steers away from {names} from step {first} on (warmup_steps), and the "
            f"sampler's steps are 0 to {steps - 1}: it would have no effect",
            hint="lower the guide's warmup_steps, or raise sample.steps; then: deleatur check",
        )
    return guide


def eraser(settings: Settings) -> Eraser:
    """Raises SettingsError where the method does not fit one of the targets, or the guide."""
    eraser = configured(settings.erase, Eraser, "erase")
    eraser.check_concepts(settings.targets)
    alternatives: Mapping[str, str] = getattr(eraser, "alternatives", {})
    if unknown := [name for name in alternatives if name not in settings.concepts]:
        raise SettingsError(
            f"erase.{settings.erase.method}.alternatives: expected concepts of params.yaml "
            f"({', '.join(settings.concepts)}), got {', '.join(unknown)}",
            hint="correct the name, or remove it; then: deleatur check",
        )
    if eraser.one_step is not None and settings.guide.method != PLAIN_GUIDE:
        raise SettingsError(
            f"guide.method: expected {PLAIN_GUIDE}, since erase.method {settings.erase.method} makes a one-step "
            f"generator, which no guide can steer, got {settings.guide.method}",
            hint=f"guide.method: {PLAIN_GUIDE}, or another erase.method; then: deleatur check",
        )
    return eraser


def requires_ratings(settings: Settings) -> bool:
    """Whether the targets have to be rated, since their tokens are learned from ratings. Words are enough otherwise;
    an eraser that learns from rated images refuses for itself where there are none.
    """
    return settings.erase.source == "token"


def requires_custom_sampler(settings: Settings) -> str:
    """What the candidate is sampled with that neither a version nor an export holds; "" where its weights are all."""
    if settings.guide.method != PLAIN_GUIDE:
        return f"the guide {settings.guide.method}"
    return "" if eraser(settings).one_step is None else "a sampler of one step"


def attacks(settings: Settings, one_step: int | None) -> dict[str, Attack]:
    """By name. one_step: as in `Delta`; attacks query a network at every noise level, and are refused on such weights.

    Raises SettingsError.
    """
    attacks = {
        name: instantiate("attacks", Attack, name, config, f"attack.methods.{name}")
        for name, config in settings.attack.methods.items()
    }
    if attacks and one_step is not None:
        raise SettingsError(
            "attack.methods: expected none, since attacks query a network at every noise level, and this eraser makes "
            f"a one-step generator; got {', '.join(attacks)}",
            hint="attack: {methods: {}}, or another erase.method; then: deleatur check",
        )
    return attacks


def inverter(settings: Settings, concept: str, name: str | None = None) -> Inverter:
    """The inversion method, with the concept's own hyperparameters over those of `invert`."""
    name = name or settings.invert.method
    config = merged(settings.invert.config(name), settings.concepts[concept].invert.get(name, {}))
    return instantiate("inversion", Inverter, name, config, f"invert.{name} with concepts.{concept}.invert")


def detectors(settings: Settings) -> dict[str, Detector]:
    """By the name that params.yaml gives them."""
    return _aliased("detectors", Detector, settings.evaluate.detectors)


def metrics(settings: Settings) -> dict[str, Metric]:
    """By the name that params.yaml gives them."""
    return _aliased("metrics", Metric, settings.evaluate.metrics)


def _aliased(kind: str, base: type[P], section: Mapping[str, Hyperparameters]) -> dict[str, P]:
    loaded = {}
    for alias, values in section.items():
        config = {key: value for key, value in values.items() if key != "method"}
        loaded[alias] = instantiate(kind, base, values["method"], config, f"evaluate.{kind}.{alias}")
    return loaded


def in_use(settings: Settings) -> list[plugins.Plugin]:
    """Every plug-in that the chain runs, once each."""
    named = [(section.kind, section.method) for section in (settings.invert, settings.erase, settings.guide)]
    named += [("attacks", name) for name in settings.attack.methods]
    for kind, section in (("detectors", settings.evaluate.detectors), ("metrics", settings.evaluate.metrics)):
        named += [(kind, config["method"]) for config in section.values()]
    return [plugins.get(kind, name) for kind, name in dict.fromkeys(named)]

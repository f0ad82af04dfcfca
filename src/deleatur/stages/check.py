"""What can be known before anything runs: do the settings name things that exist, with numbers that fit?"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from deleatur import metrics, plug
from deleatur.attacks import Attack
from deleatur.detectors import Detector
from deleatur.diffusion import folders
from deleatur.diffusion.load import device_of
from deleatur.erasers import Eraser
from deleatur.errors import SettingsError, at
from deleatur.gate import HARMFUL
from deleatur.guides import Guide
from deleatur.inversion import Inverter
from deleatur.io import tables
from deleatur.io.signing import Keys
from deleatur.metrics import Metric
from deleatur.records import Role
from deleatur.settings import Choice, Settings
from deleatur.stages import ingest, inputs
from deleatur.stages.compare import plan

SHELVES: dict[str, type[BaseModel]] = {
    "erasers": Eraser,
    "inversion": Inverter,
    "guides": Guide,
    "detectors": Detector,
    "metrics": Metric,
    "attacks": Attack,
}


def check(settings: Settings) -> list[str]:
    """What was found in order, a line each. Raises SettingsError, DataError or ModelError at the first thing that is
    not there or does not fit. No network is loaded: its config and the heads of its files are read.
    """
    for folder in settings.paths.written.values():
        tables.demand_free(folder)
    lines = [*_methods(settings), *_networks(settings)]
    lines += [f"{m.shelf}: {m.name} is a method of {m.origin}" for m in inputs.used(settings) if m.package]
    for name in settings.targets:
        spec = settings.concepts[name]
        inputs.prompts(spec.prompts, "dev", name, "concept")  # what erasing looks at
        lines.append(
            f"concepts.{name}: {len(inputs.written(settings, name))} prompts of the split {settings.sample.split}"
        )
    inputs.to_preserve(settings)
    lines.append(f"paths.prompts: {len(inputs.written(settings))} prompts of the split {settings.sample.split}")
    demand_labels(settings)
    lines.append(f"ingest.sources: {len(ingest.find(settings.ingest.sources))} file(s)")
    if inputs.eraser(settings).learns_from_pictures:
        for name in settings.targets:
            ingest.demand_rated(settings, name)
    _rules(settings)
    lines.append(f"gate: {len(settings.gate.rules)} rules")
    trusted = len(Keys.load(settings.register_.trusted_keys).trusted)
    lines.append(f"register: {trusted} trusted keys" if trusted else "register: no key, so that versions are unsigned")
    return [*lines, *_compared(settings)]


def _compared(settings: Settings) -> Iterator[str]:
    """Every row can be, or it is said why not; for every concept there is what it is asked and judged by."""
    if settings.compare is None:
        return
    asked, rows = settings.compare, plan.rows(settings)
    for concept in asked.concepts:
        inputs.prompts(settings.concepts[concept].prompts, "dev", concept, "concept")
        demand_labels(plan.settings_of(settings, plan.Cell(concept, plan.NONE, settings.seed)))
        can_not = [row for row in rows if plan.refused(settings, concept, row)]
        refused = f", refused: {', '.join(can_not)}" if can_not else ""
        yield f"compare: {len(rows)} rows of {concept} with {len(asked.seeds)} seeds{refused}"


def demand_labels(settings: Settings) -> None:
    """Raises SettingsError where a concept, a metric or a prompt asks for a detector, or for a label of one, that there
    is not.
    """
    known = {name: detector.peek() for name, detector in inputs.detectors(settings).items()}
    counts = {n: (s.found.detector, s.found.labels) for n, s in settings.concepts.items() if n in settings.targets}
    for name, (detector, labels) in counts.items():
        for label in labels:
            _demand(known, detector, label, f"concepts.{name}.found")
    asked = [p for name in ("", *settings.targets) for p in inputs.written(settings, name)]
    of_prompt = {metrics.labelled(p): p.id for p in reversed(asked)}
    for name, metric in inputs.metrics(settings).items():
        for detector, label in sorted(metric.needs(asked, counts)):
            prompt = f", for the prompt {found}" if (found := of_prompt.get((detector, label))) else ""
            _demand(known, detector, label, f"evaluate.metrics.{name}{prompt}")


def _demand(known: Mapping[str, Sequence[str] | None], detector: str, label: str, where: str) -> None:
    if detector not in known:
        raise SettingsError(
            f"{where}: expected a detector of evaluate.detectors ({', '.join(known)}), got {detector!r}",
            hint="correct it or add the detector, then: deleatur check",
        )
    labels = known[detector]
    if labels is not None and label not in labels:
        near = get_close_matches(label, labels, 3) or sorted(labels)[:5]
        raise SettingsError(
            f"{where}: {detector} has no label {label!r}; near are {', '.join(near)}",
            hint="correct the label, then: deleatur check",
        )


def _methods(settings: Settings) -> Iterator[str]:
    """Every method that is named, used or not, has numbers that fit."""
    sections: tuple[tuple[str, Choice, type[BaseModel]], ...] = (
        ("invert", settings.invert, Inverter),
        ("erase", settings.erase, Eraser),
        ("guide", settings.guide, Guide),
    )
    for where, section, base in sections:
        for name in section.named:
            inputs.chosen(section, base, where, name)
        used, *others = section.named
        yield f"{where}: {used}" + (f" (numbers of {', '.join(others)} stand by)" if others else "")
    inputs.guide(settings)  # which also has to act before the sampler ends
    eraser = inputs.eraser(settings)
    for concept in settings.targets:
        for name in settings.concepts[concept].invert:
            inputs.inverter(settings, concept, name)
    yield from (f"attack: {name}" for name in inputs.attacks(settings, eraser.one_step))
    yield f"evaluate.metrics: {', '.join(inputs.metrics(settings))}"


def _networks(settings: Settings) -> Iterator[str]:
    """Every network is there and whole, as far as this can be told without asking anybody."""
    device_of(settings.base.device)
    yield from _network("base.model", settings.base.model, folders.pipeline, "model_index.json")
    yield from _network("reward.clip", settings.reward.clip, folders.clip)
    for name, detector in inputs.detectors(settings).items():
        with at(f"evaluate.detectors.{name}"):
            labels = detector.peek()
        yield f"evaluate.detectors.{name}: {f'{len(labels)} labels' if labels else ELSEWHERE}"


ELSEWHERE = "not on this disk; it is fetched when it is needed"


def _network(where: str, address: str, look: Callable[[Path], None], file: str = "config.json") -> Iterator[str]:
    with at(where):
        folder = None if "://" in address or address.startswith("models:/") else folders.find(address, file)
        if folder:
            look(folder)
    yield f"{where}: {address}" + ("" if folder else f", {ELSEWHERE}")


def _rules(settings: Settings) -> None:
    """Every rule judges a metric on a slice, the metric has a number of it, and there are pictures enough."""
    per_prompt, measured = settings.sample.per_prompt, inputs.metrics(settings)
    drawn = Counter[str]()
    for (role, concept), n in inputs.drawn(settings).items():
        drawn[role] += n
        if concept and len(settings.targets) > 1:
            drawn[f"{role}/{concept}"] = n
    learned: tuple[Role, ...] = ("token", "attack") if settings.attack.methods else ("token",)  # nobody knows how many
    slices = sorted([part for part, n in drawn.items() if n] + [role for role in learned if per_prompt.get(role, 1)])
    for name, rule in settings.gate.rules.items():
        for what, value, known in (("metric", rule.metric, settings.evaluate.metrics), ("slice", rule.slice, slices)):
            if value not in known:
                raise SettingsError(
                    f"gate.rules.{name}: expected a {what} that is measured ({', '.join(known)}), got {value!r}",
                    hint=f"correct the {what}, then: deleatur check",
                )
        metric = measured[rule.metric]
        role_of = rule.slice.split("/")[0]
        if metric.of != "any" and (metric.of == "concept") != (role_of in HARMFUL):
            which = "that ask for a concept" if metric.of == "concept" else "that do not ask for a concept"
            raise SettingsError(
                f"gate.rules.{name}: {rule.metric} has numbers of prompts {which} only, and the slice is {rule.slice}",
                hint="correct the slice, then: deleatur check",
            )
        if isinstance(metric, metrics.SetMetric) and (rule.versus or rule.relative or rule.side == "base"):
            raise SettingsError(
                f"gate.rules.{name}: {rule.metric} is the distance to the base model's pictures, a number by itself",
                hint="leave out versus, relative and side, then: deleatur check",
            )
        # A rule about a role is one about each concept of it.
        fewest = min((n for part, n in drawn.items() if f"{part}/".startswith(f"{rule.slice}/")), default=rule.min_n)
        if rule.min_n > fewest:
            raise SettingsError(
                f"gate.rules.{name}: expected min_n of at most {fewest}, "
                f"which is what will be drawn of the slice {rule.slice}, got {rule.min_n}",
                hint=f"raise sample.per_prompt.{role_of} or lower min_n, then: deleatur check",
            )


def catalogue(shelf: str | None) -> dict[str, dict[str, Any]]:
    """Shelf → method → its source line and its numbers with defaults and meanings."""
    if shelf is not None and shelf not in SHELVES:
        raise SettingsError(f"no shelf {shelf!r}: there is {', '.join(SHELVES)}", hint="deleatur methods")
    return {s: {n: _entry(s, n) for n in plug.names(s)} for s in SHELVES if shelf in (None, s)}


def _entry(shelf: str, name: str) -> dict[str, Any]:
    found = plug.find(shelf, name, SHELVES[shelf])
    source = next(iter((sys.modules[found.__module__].__doc__ or "").strip().splitlines()), "")
    return {"source": source, "package": plug.method(shelf, name).origin, "numbers": _numbers(found)}


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

"""What can be known before anything runs: do the settings name things that exist, with numbers that fit?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel

from deleatur import metrics
from deleatur.artifacts import prompts
from deleatur.artifacts.labels import demand_labels
from deleatur.benchmark import plan
from deleatur.config import methods
from deleatur.config.settings import Choice, Settings
from deleatur.diffusion import folders
from deleatur.diffusion.model import device_of
from deleatur.erasers import Eraser
from deleatur.errors import SettingsError, at
from deleatur.gate import HARMFUL
from deleatur.guides import Guide
from deleatur.inversion import Inverter
from deleatur.records.sampling import Role
from deleatur.registry.signing import Keys
from deleatur.stages import ingest
from deleatur.storage import files


def check(settings: Settings) -> list[str]:
    """What was found in order, a line each. Raises SettingsError, DataError or ModelError at the first thing that is
    not there or does not fit. No network is loaded: its config and the heads of its files are read.
    """
    for folder in settings.paths.written.values():
        files.demand_free(folder)
    lines = [*_methods(settings), *_networks(settings)]
    lines += [f"{m.shelf}: {m.name} is a method of {m.origin}" for m in methods.in_use(settings) if m.package]
    for name in settings.targets:
        spec = settings.concepts[name]
        prompts.read(spec.prompts, "dev", name, "concept")  # what erasing looks at
        count = len(prompts.for_evaluation(settings, name))
        lines.append(f"concepts.{name}: {count} prompts of the split {settings.sample.split}")
    prompts.to_preserve(settings)
    lines.append(f"paths.prompts: {len(prompts.for_evaluation(settings))} prompts of the split {settings.sample.split}")
    demand_labels(settings)
    lines.append(f"ingest.sources: {len(ingest.find(settings.ingest.sources))} file(s)")
    if methods.eraser(settings).learns_from_pictures:
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
        prompts.read(settings.concepts[concept].prompts, "dev", concept, "concept")
        demand_labels(plan.settings_of(settings, plan.Cell(concept, plan.NONE, settings.seed)))
        can_not = [row for row in rows if plan.refused(settings, concept, row)]
        refused = f", refused: {', '.join(can_not)}" if can_not else ""
        yield f"compare: {len(rows)} rows of {concept} with {len(asked.seeds)} seeds{refused}"


def _methods(settings: Settings) -> Iterator[str]:
    """Every method that is named, used or not, has numbers that fit."""
    sections: tuple[tuple[str, Choice, type[BaseModel]], ...] = (
        ("invert", settings.invert, Inverter),
        ("erase", settings.erase, Eraser),
        ("guide", settings.guide, Guide),
    )
    for where, section, base in sections:
        for name in section.named:
            methods.configured(section, base, where, name)
        used, *others = section.named
        yield f"{where}: {used}" + (f" (numbers of {', '.join(others)} stand by)" if others else "")
    methods.guide(settings)  # which also has to act before the sampler ends
    eraser = methods.eraser(settings)
    for concept in settings.targets:
        for name in settings.concepts[concept].invert:
            methods.inverter(settings, concept, name)
    yield from (f"attack: {name}" for name in methods.attacks(settings, eraser.one_step))
    yield f"evaluate.metrics: {', '.join(methods.metrics(settings))}"


def _networks(settings: Settings) -> Iterator[str]:
    """Every network is there and whole, as far as this can be told without asking anybody."""
    device_of(settings.base.device)
    yield from _network("base.model", settings.base.model, folders.pipeline, "model_index.json")
    yield from _network("reward.clip", settings.reward.clip, folders.clip)
    for name, detector in methods.detectors(settings).items():
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
    per_prompt, measured = settings.sample.per_prompt, methods.metrics(settings)
    drawn = Counter[str]()
    for (role, concept), n in prompts.image_counts(settings).items():
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

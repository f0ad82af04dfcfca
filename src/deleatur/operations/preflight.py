"""Validates settings, methods and input files before anything runs: `deleatur check`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel

from deleatur import metrics
from deleatur.artifacts import prompts
from deleatur.artifacts.labels import require_labels
from deleatur.benchmark import plan
from deleatur.config import methods
from deleatur.config.plugin_config import PluginSection
from deleatur.config.settings import Settings
from deleatur.diffusion import folders, pipelines
from deleatur.diffusion.model import resolve_device
from deleatur.erasers import Eraser
from deleatur.errors import DataError, SettingsError, error_context
from deleatur.gate import CONCEPT_ROLES, LEARNED_ROLES
from deleatur.guides import Guide
from deleatur.inversion import Inverter
from deleatur.maths.noise import NoiseSchedule
from deleatur.operations.prompt_lengths import check_clip_texts, check_eraser_prompts, check_prompt_lengths
from deleatur.records.sampling import Role
from deleatur.registry.signing import Keys
from deleatur.stages import ingest
from deleatur.storage import files


def check(settings: Settings) -> list[str]:
    """Checks everything that can be checked without loading a network, and returns one line per item.

    Reads only the configs of networks and the headers of their weight files. Raises SettingsError, DataError or
    ModelError for the first item that is missing or invalid.
    """
    for folder in settings.paths.outputs.values():
        files.require_untracked(folder)
    _check_names(settings)
    lines = [*_methods(settings), *_networks(settings)]
    lines += [f"{m.kind}: {m.name} is a plug-in of {m.origin}" for m in methods.in_use(settings) if m.package]
    for name in settings.targets:
        spec = settings.concepts[name]
        prompts.read(spec.prompts, "dev", name, "concept")  # which `erase` evaluates on
        count = len(prompts.evaluation_prompts(settings, name))
        lines.append(f"concepts.{name}: {count} prompts of the split {settings.sample.split}")
    prompts.preserved_prompts(settings)
    lines.append(
        f"paths.prompts: {len(prompts.evaluation_prompts(settings))} prompts of the split {settings.sample.split}"
    )
    if pipeline := local_folder(settings.base.model, "model_index.json"):
        schedule = pipelines.read_schedule(pipeline)
        _check_timesteps(settings, schedule)
        timesteps = schedule.timesteps(settings.sample.steps)
        lines.append(f"sample.steps: DDIM, {schedule.timestep_spacing}, timesteps {timesteps[0]} to {timesteps[-1]}")
        check_prompt_lengths(settings, pipelines.TextLimits.from_folder(pipeline))
        lines.append("base.model: every word, template and prompt fits its text encoder")
    check_clip_texts(settings, lambda address: local_folder(address, "config.json"))
    require_labels(settings)
    sources = ingest.find_sources(settings, required=methods.requires_ratings(settings))
    lines.append(f"ingest.sources: {len(sources)} file(s)")
    for name in settings.targets:
        if methods.requires_ratings(settings):
            ingest.require_answered(settings, name)
        if methods.eraser(settings).learns_from_images:
            ingest.require_rated(settings, name)
    _check_rules(settings)
    lines.append(f"gate: {len(settings.gate.rules)} rules")
    num_keys = len(Keys.load(settings.register_.trusted_keys).trusted)
    lines.append(
        f"register: {num_keys} trusted keys" if num_keys else "register: no trusted key, versions are unsigned"
    )
    return [*lines, *_benchmark(settings)]


def _check_timesteps(settings: Settings, schedule: NoiseSchedule) -> None:
    """Raises SettingsError unless the schedule has the timesteps that sampling and every configured eraser need."""
    with error_context("sample.steps"):
        schedule.timesteps(settings.sample.steps)
    for name in settings.erase.configured:
        with error_context(f"erase.{name}"):
            methods.configured(settings.erase, Eraser, "erase", name).check_schedule(schedule)


NAME = re.compile(r"\w[\w.\- ]*")


def _check_names(settings: Settings) -> None:
    """Names of metrics are part of MLflow's metric names, METRIC/SLICE/VARIANT, and those of detectors of a prompt's
    label, DETECTOR:LABEL. MLflow refuses other characters when a version is registered, after everything has run.
    """
    for section, names in (("metrics", settings.evaluate.metrics), ("detectors", settings.evaluate.detectors)):
        for name in names:
            if len(name) > 100 or not NAME.fullmatch(name):
                raise SettingsError(
                    f"evaluate.{section}.{name}: expected at most 100 letters, digits, spaces and _ - . only, "
                    f"got {name!r}",
                    hint="rename it wherever params.yaml and prompts refer to it, then: deleatur check",
                )


def _benchmark(settings: Settings) -> Iterator[str]:
    """Checks that every concept has prompts and detector labels; a line each, with the methods refused for it."""
    if settings.compare is None:
        return
    section, rows = settings.compare, plan.row_names(settings)
    for concept in section.concepts:
        prompts.read(settings.concepts[concept].prompts, "dev", concept, "concept")
        require_labels(plan.trial_settings(settings, plan.Trial(concept, plan.NONE, settings.seed)))
        refused = [row for row in rows if plan.refusal(settings, concept, row)]
        if pipeline := local_folder(settings.base.model, "model_index.json"):
            schedule, limits = pipelines.read_schedule(pipeline), pipelines.TextLimits.from_folder(pipeline)
            for row in (row for row in rows if row not in refused):
                with error_context(f"compare, {row}"):
                    trial = plan.trial_settings(settings, plan.Trial(concept, row, settings.seed))
                    _check_timesteps(trial, schedule)
                    check_eraser_prompts(trial, limits)
        note = f", refused: {', '.join(refused)}" if refused else ""
        yield f"compare: {len(rows)} methods for {concept} with {len(section.seeds)} seeds{note}"


def _methods(settings: Settings) -> Iterator[str]:
    """Checks the hyperparameters of every configured method, in use or not."""
    sections: tuple[tuple[str, PluginSection, type[BaseModel]], ...] = (
        ("invert", settings.invert, Inverter),
        ("erase", settings.erase, Eraser),
        ("guide", settings.guide, Guide),
    )
    for key, section, base in sections:
        for name in section.configured:
            methods.configured(section, base, key, name)
        used, *others = section.configured
        yield f"{key}: {used}" + (f" (also configured: {', '.join(others)})" if others else "")
    methods.guide(settings)  # checks also that it acts before the sampler's last step
    eraser = methods.eraser(settings)
    for concept in settings.targets:
        for name in settings.concepts[concept].invert:
            methods.inverter(settings, concept, name)
    yield from (f"attack: {name}" for name in methods.attacks(settings, eraser.one_step))
    yield f"evaluate.metrics: {', '.join(methods.metrics(settings))}"


def _networks(settings: Settings) -> Iterator[str]:
    """Checks that every network on this disk has all its files, with matching shapes."""
    resolve_device(settings.base.device)
    yield from _network("base.model", settings.base.model, pipelines.check_pipeline, "model_index.json")
    yield from _network("reward.clip", settings.reward.clip, folders.check_clip)
    for name, detector in methods.detectors(settings).items():
        with error_context(f"evaluate.detectors.{name}"):
            labels = detector.read_labels()
        yield f"evaluate.detectors.{name}: {f'{len(labels)} labels' if labels else NOT_LOCAL}"


NOT_LOCAL = "not on this disk, downloaded at first use"


def _network(setting: str, address: str, check: Callable[[Path], None], file: str = "config.json") -> Iterator[str]:
    with error_context(setting):
        if folder := local_folder(address, file):
            check(folder)
    yield f"{setting}: {address}" + ("" if folder else f", {NOT_LOCAL}")


def local_folder(address: str, file: str) -> Path | None:
    """The folder of a model; None if it is not on this disk. `file`: a file that the folder has to contain."""
    return None if "://" in address or address.startswith("models:/") else folders.locate(address, file)


def rules_without_evidence(settings: Settings) -> Iterator[str]:
    """A warning for each rule about tokens or attacks and each target without ratings, which will have neither."""
    for concept in settings.targets:
        try:
            ingest.require_answered(settings, concept)
        except DataError:
            for name, rule in settings.gate.rules.items():
                role, _, of_concept = rule.slice.partition("/")
                if role in LEARNED_ROLES and of_concept in ("", concept):
                    alone = of_concept or len(settings.targets) == 1
                    effect = "the verdict cannot be a pass" if alone else "it judges the other targets alone"
                    yield (
                        f"gate.rules.{name}: nobody rated images of {concept}, so there is nothing to measure on its "
                        f"{role} prompts: {effect}"
                    )


def _check_rules(settings: Settings) -> None:
    """Checks that every rule names a metric and a slice that are measured together, on enough images for `min_n`."""
    images_per_prompt, metrics_by_name = settings.sample.images_per_prompt, methods.metrics(settings)
    image_counts = Counter[str]()
    for (role, concept), n in prompts.image_counts(settings).items():
        image_counts[role] += n
        if concept and len(settings.targets) > 1:
            image_counts[f"{role}/{concept}"] = n
    # How many tokens and attack prompts there will be is known only once they are learned.
    uncounted: tuple[Role, ...] = ("token", "attack") if settings.attack.methods else ("token",)
    learned = [role for role in uncounted if images_per_prompt.get(role, 1)]
    of_concepts = [f"{role}/{name}" for role in learned for name in settings.targets if len(settings.targets) > 1]
    slices = sorted([*(slice_name for slice_name, n in image_counts.items() if n), *learned, *of_concepts])
    for name, rule in settings.gate.rules.items():
        for field, value, available in (
            ("metric", rule.metric, settings.evaluate.metrics),
            ("slice", rule.slice, slices),
        ):
            if value not in available:
                raise SettingsError(
                    f"gate.rules.{name}: expected a {field} that is measured ({', '.join(available)}), got {value!r}",
                    hint=f"correct the {field}, then: deleatur check",
                )
        metric = metrics_by_name[rule.metric]
        role_of_slice = rule.slice.split("/")[0]
        if metric.prompt_scope != "any" and (metric.prompt_scope == "concept") != (role_of_slice in CONCEPT_ROLES):
            scope = "that ask for a concept" if metric.prompt_scope == "concept" else "that do not ask for a concept"
            raise SettingsError(
                f"gate.rules.{name}: {rule.metric} is measured on prompts {scope} only, and the slice is {rule.slice}",
                hint="correct the slice, then: deleatur check",
            )
        if isinstance(metric, metrics.SetMetric) and (rule.versus or rule.relative or rule.variant == "base"):
            raise SettingsError(
                f"gate.rules.{name}: {rule.metric} is a distance to the base model's images, which has no baseline",
                hint="leave out versus, relative and variant, then: deleatur check",
            )
        # A rule on a role applies to each concept of that role.
        fewest = min(
            (n for part, n in image_counts.items() if f"{part}/".startswith(f"{rule.slice}/")), default=rule.min_n
        )
        if rule.min_n > fewest:
            raise SettingsError(
                f"gate.rules.{name}: expected min_n of at most {fewest}, "
                f"the number of images of the slice {rule.slice}, got {rule.min_n}",
                hint=f"raise sample.images_per_prompt.{role_of_slice} or lower min_n, then: deleatur check",
            )

"""The benchmark's rows: the settings of each, what its stages depend on, and why a row is refused.

A row is named after an eraser (`sdd`), a guide (`sld`: steers sampling, weights unchanged) or an entry of
`compare.overrides`; `none`, the base model, is always included. `hfi+` before a name: conditioned on soft tokens
instead of words.

    <folder>/<concept>/ratings/<seed>/   feedback and reward, shared by all rows; <seed> is that of params.yaml
    <folder>/<concept>/tokens/<seed>/    soft tokens, shared by all rows of a training seed
    <folder>/<concept>/<row>/<seed>/     outputs of all other stages
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from deleatur import dependencies, plugins
from deleatur.benchmark.table import HFI_PREFIX
from deleatur.config import methods
from deleatur.config.sections import CompareSection
from deleatur.config.settings import Settings, merged
from deleatur.erasers import Eraser
from deleatur.errors import DataError, SettingsError
from deleatur.guides import Guide
from deleatur.stages import ingest
from deleatur.storage import files

NONE, KEEP = "none", "keep"
PLAN, RATINGS, TOKENS, CHECKPOINTS = "plan", "ratings", "tokens", "checkpoints"
RESERVED = (NONE, PLAN, RATINGS, TOKENS, CHECKPOINTS)
"""Names that no entry of `compare.overrides` may have: folders beside those of the rows."""
SHARED: Mapping[str, tuple[str, ...]] = {RATINGS: ("ingest", "reward"), TOKENS: ("invert",)}
"""Trials whose results rows share → their stages."""

STAGE_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "ingest": ("ingest", "erase.source"),
    "reward": ("base.device", "reward", "erase.source"),
    "invert": ("base", "guide", "invert", "reward.clip", "sample.steps"),
    "erase": ("base", "guide", "erase", "reward.clip", "sample.steps", "evaluate.detectors"),
    "attack": ("base", "attack", "reward.clip"),
    "sample": ("base", "guide", "erase.source", "sample"),
    "evaluate": ("evaluate",),
}
"""Settings that a stage depends on, besides the concept and the seed."""


@dataclass(frozen=True)
class Trial:
    """One row on one concept with one training seed. Shared results are trials too: the rows `ratings` and `tokens`."""

    concept: str
    row: str
    seed: int


def section(settings: Settings) -> CompareSection:
    """The section `compare`. Raises SettingsError where params.yaml has none."""
    if settings.compare is None:
        raise SettingsError(
            "params.yaml has no section `compare`: which methods, on which concepts, with which seeds",
            hint="add it, as docs/compare.md says; then: deleatur check",
        )
    return settings.compare


def row_names(settings: Settings) -> list[str]:
    """All rows in order, the base model first. Raises SettingsError for an unknown or reserved name."""
    compare, known = section(settings), _known_methods(settings)
    if taken := sorted({*plugins.names("erasers"), *plugins.names("guides"), *RESERVED} & compare.overrides.keys()):
        raise SettingsError(
            f"compare.overrides: the name {', '.join(taken)} is taken",
            hint="rename it, also in compare.methods, then: deleatur check",
        )
    for row in compare.methods:
        if row.removeprefix(HFI_PREFIX) not in known:
            raise SettingsError(
                f"compare.methods: expected {', '.join(known)}, or one of them after {HFI_PREFIX}, got {row!r}"
                + (f"; {NONE} is always included and not listed" if row == NONE else ""),
                hint="correct it, then: deleatur check",
            )
    return [NONE, *compare.methods]


def _known_methods(settings: Settings) -> list[str]:
    """Erasers, guides and overrides, without `keep` and `cfg`, whose combination is `none`."""
    names = [name for kind in ("erasers", "guides") for name in plugins.names(kind)]
    return [*(name for name in names if name not in (KEEP, methods.PLAIN_GUIDE)), *section(settings).overrides]


def trial_folder(settings: Settings, trial: Trial) -> Path:
    return section(settings).folder / trial.concept / trial.row / str(trial.seed)


def trial_settings(settings: Settings, trial: Trial) -> Settings:
    """params.yaml for one trial. Raises SettingsError where an override does not fit the sections that it changes."""
    compare = section(settings)
    changes: dict[str, Any] = {
        "seed": trial.seed,
        "targets": [trial.concept],
        "compare": None,
        "sample": {"split": compare.split, "champion": None},
        "guide": {"method": methods.PLAIN_GUIDE},
    }
    params = merged(settings.model_dump(by_alias=True), merged(changes, _method_sections(compare, trial.row)))
    folder = trial_folder(settings, trial)
    # A guide alone changes no weights, so that delta and attacks are those of the base model.
    weights = trial_folder(settings, replace(trial, row=NONE)) if params["erase"]["method"] == KEEP else folder
    ratings = trial_folder(settings, replace(trial, row=RATINGS, seed=settings.seed))
    params["paths"] |= {name: folder / name for name in ("samples", "scores", "report", "verdict")}
    params["paths"] |= {name: weights / name for name in ("delta", "attacks")}
    params["paths"] |= {name: ratings / name for name in ("feedback", "data_docs", "reward")}
    params["paths"] |= {"tokens": trial_folder(settings, replace(trial, row=TOKENS)) / "tokens"}
    params["paths"] |= {"checkpoints": compare.folder / trial.concept / CHECKPOINTS / f"{trial.row}-{trial.seed}"}
    source = f"params.yaml with compare.overrides.{trial.row.removeprefix(HFI_PREFIX)}"
    validated = Settings.of(params, source)
    if methods.configured(validated.erase, Eraser, "erase").one_step is None:
        return validated
    return Settings.of(params | {"attack": {"methods": {}}}, source)  # attacks need more than one step


def _method_sections(compare: CompareSection, row: str) -> Mapping[str, Any]:
    """The sections `erase` and `guide` of a row."""
    name, source = row.removeprefix(HFI_PREFIX), "token" if row.startswith(HFI_PREFIX) else "words"
    if name in compare.overrides:
        return merged({"erase": {"source": source}}, compare.overrides[name].model_dump())
    if name in plugins.names("guides"):
        return {"erase": {"method": KEEP, "source": source}, "guide": {"method": name}}
    return {"erase": {"method": name if name in plugins.names("erasers") else KEEP, "source": source}}


def refusal(settings: Settings, concept: str, row: str) -> str:
    """Why a row cannot be compared on a concept; empty: it can.

    Raises SettingsError for invalid hyperparameters, which are a mistake in params.yaml and no property of the method.
    """
    trial = trial_settings(settings, Trial(concept, row, settings.seed))
    eraser, guide = methods.configured(trial.erase, Eraser, "erase"), methods.configured(trial.guide, Guide, "guide")
    plain = methods.configured(settings.guide, Guide, "guide", methods.PLAIN_GUIDE)
    is_guided = trial.guide.method != methods.PLAIN_GUIDE
    if row == NONE:
        return ""
    if trial.erase.method == KEEP and not is_guided:
        return f"it changes nothing: it is {NONE}"
    if guide.scale != plain.scale:
        return (
            f"guide.{trial.guide.method}.scale is {guide.scale:g}, but the base model is sampled with "
            f"guide.{methods.PLAIN_GUIDE}.scale {plain.scale:g}: images would differ by that too"
        )
    if eraser.learns_from_images and trial.erase.source == "token" and not is_guided:
        return f"{trial.erase.method} learns from rated images and uses neither words nor tokens"
    try:
        methods.guide(trial)
        if methods.eraser(trial).learns_from_images:
            ingest.require_rated(settings, concept)
        if methods.requires_ratings(trial):
            ingest.require_answered(settings, concept)
    except (SettingsError, DataError) as e:
        return str(e)
    return ""


def stages_of(settings: Settings, concept: str, row: str) -> tuple[str, ...]:
    """The stages of a row's trials. A guide alone has the weights of `none`, and the attacks on them."""
    if row in SHARED:
        return SHARED[row]
    is_guide = row != NONE and trial_settings(settings, Trial(concept, row, settings.seed)).erase.method == KEEP
    return ("sample", "evaluate") if is_guide else ("erase", "attack", "sample", "evaluate")


def stage_inputs(settings: Settings, concept: str, row: str) -> dict[str, Any]:
    """Everything in params.yaml and in the code that a row depends on, by stage; or why it is refused.

    Hyperparameters of other methods do not count: another learning rate for ESD leaves UCE's results up to date.
    """
    if row not in SHARED and (reason := refusal(settings, concept, row)):
        return {"refused": reason}
    trial = trial_settings(settings, Trial(concept, row, settings.seed))
    spec, params = trial.concepts[concept].model_dump(mode="json"), trial.model_dump(by_alias=True)
    return {"refused": ""} | {
        stage: {"concept": spec, "code": dependencies.stage_digests(stage, params)}
        | {dotted: _setting(trial, dotted) for dotted in STAGE_SETTINGS[stage]}
        for stage in stages_of(settings, concept, row)
    }


def _setting(settings: Settings, dotted: str) -> Any:
    """The value at a dotted path; of a section that selects a method, that method with all its hyperparameters."""
    configured: dict[str, Callable[[], BaseModel]] = {
        "invert": lambda: methods.inverter(settings, settings.targets[0]),
        "erase": lambda: methods.configured(settings.erase, Eraser, "erase"),
        "guide": lambda: methods.configured(settings.guide, Guide, "guide"),
    }
    if build := configured.get(dotted):
        section = getattr(settings, dotted).model_dump(mode="json", include={"method", "source"})
        return section | {"hyperparameters": build().model_dump(mode="json")}
    value: Any = settings
    for key in dotted.split("."):
        value = getattr(value, key)
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def write_plan(settings: Settings, concept: str) -> None:
    """Writes the inputs of each row to a file of its own, by which DVC knows which trials are out of date."""
    folder = files.empty_folder(section(settings).folder / concept / PLAN)
    for row in (*SHARED, *row_names(settings)):
        files.write_json(folder / f"{row}.json", stage_inputs(settings, concept, row))


def select(names: Sequence[Any], known: Sequence[Any], key: str) -> list[Any]:
    """The named items of `compare.<key>` in params.yaml, in its order; all of them when none is named.

    Raises SettingsError for a name that params.yaml does not have: results are compared only as params.yaml has them.
    """
    if unknown := [name for name in names if name not in known]:
        raise SettingsError(
            f"expected {key} of params.yaml ({', '.join(map(str, known))}), got {', '.join(map(str, unknown))}",
            hint=f"add it to compare.{key} in params.yaml, then the same command again",
        )
    return [item for item in known if item in names] if names else list(known)

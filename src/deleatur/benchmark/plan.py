"""What each row of a comparison is, and which rows cannot be.

A row's name is an eraser (`sdd`), a guide (`sld`: the weights stay, sampling is steered), a variant that params.yaml
describes, or `none`, the untouched model, which is always there. `hfi+` before it: told by soft tokens, not words.

    <folder>/<concept>/ratings/<seed>/   feedback and reward, shared by all rows; <seed> is that of params.yaml
    <folder>/<concept>/tokens/<seed>/    soft tokens, shared by all rows of a training seed
    <folder>/<concept>/<row>/<seed>/     all else that the chain makes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from deleatur import dependencies, plugins
from deleatur.benchmark.table import HFI
from deleatur.config import methods
from deleatur.config.settings import Compare, Settings, merged
from deleatur.erasers import Eraser
from deleatur.errors import DataError, SettingsError
from deleatur.guides import Guide
from deleatur.stages import ingest
from deleatur.storage import files

NONE, KEEP = "none", "keep"
PLAN, RATINGS, TOKENS, STATE = "plan", "ratings", "tokens", "state"
RESERVED = (NONE, PLAN, RATINGS, TOKENS, STATE)
"""Folders of a concept that are no row's, and the row that needs no listing."""
SHARED: Mapping[str, tuple[str, ...]] = {RATINGS: ("ingest", "reward"), TOKENS: ("invert",)}
"""What rows share, and the stages that make it."""

READS: Mapping[str, tuple[str, ...]] = {
    "ingest": ("ingest",),
    "reward": ("base.device", "reward"),
    "invert": ("base", "guide", "invert", "reward.clip", "sample.steps"),
    "erase": ("base", "guide", "erase", "reward.clip", "sample.steps"),
    "attack": ("base", "attack", "reward.clip"),
    "sample": ("base", "guide", "erase.source", "sample"),
    "evaluate": ("evaluate",),
}
"""Settings that a stage depends on, beside the concept and the seed."""


@dataclass(frozen=True)
class Cell:
    """One row of one concept with one training seed, or what rows share: `ratings`, `tokens`."""

    concept: str
    row: str
    seed: int


def section(settings: Settings) -> Compare:
    """Raises SettingsError where params.yaml says nothing of a comparison."""
    if settings.compare is None:
        raise SettingsError(
            "params.yaml has no section `compare`: which methods, on which concepts, with which seeds",
            hint="add it, as docs/compare.md says; then: deleatur check",
        )
    return settings.compare


def rows(settings: Settings) -> list[str]:
    """All rows in order, the untouched model first. Raises SettingsError for a name that is nothing of the kind."""
    asked, known = section(settings), _known(settings)
    if taken := sorted({*plugins.names("erasers"), *plugins.names("guides"), *RESERVED} & asked.variants.keys()):
        raise SettingsError(
            f"compare.variants: {', '.join(taken)} is taken; a variant needs a name of its own",
            hint="rename it, also in compare.methods, then: deleatur check",
        )
    for row in asked.methods:
        if row.removeprefix(HFI) not in known:
            raise SettingsError(
                f"compare.methods: expected {', '.join(known)}, or one of them after {HFI}, got {row!r}"
                + (f"; {NONE} is always there, and is not listed" if row == NONE else ""),
                hint="correct it, then: deleatur check",
            )
    return [NONE, *asked.methods]


def _known(settings: Settings) -> list[str]:
    """Erasers, guides and variants; not `keep` and `cfg`, which together are `none`."""
    named = [n for shelf in ("erasers", "guides") for n in plugins.names(shelf)]
    return [*(n for n in named if n not in (KEEP, methods.PLAIN_GUIDE)), *section(settings).variants]


def place(settings: Settings, cell: Cell) -> Path:
    return section(settings).folder / cell.concept / cell.row / str(cell.seed)


def settings_of(settings: Settings, cell: Cell) -> Settings:
    """params.yaml as one cell sees it. Raises SettingsError where a variant does not fit the sections it changes."""
    asked = section(settings)
    changes: dict[str, Any] = {
        "seed": cell.seed,
        "targets": [cell.concept],
        "compare": None,
        "sample": {"split": asked.split, "champion": None},
        "guide": {"method": methods.PLAIN_GUIDE},
    }
    whole = merged(settings.model_dump(by_alias=True), merged(changes, _of_row(asked, cell.row)))
    own = place(settings, cell)
    # What a guide is compared with is the untouched model: its weights are those, and so are the attacks on them.
    weights = place(settings, replace(cell, row=NONE)) if whole["erase"]["method"] == KEEP else own
    whole["paths"] |= {name: own / name for name in ("shots", "scores", "report", "verdict")}
    whole["paths"] |= {name: weights / name for name in ("delta", "attacks")}
    ratings, tokens = (replace(cell, row=RATINGS, seed=settings.seed), replace(cell, row=TOKENS))
    whole["paths"] |= {name: place(settings, ratings) / name for name in ("feedback", "data_docs", "reward")}
    whole["paths"] |= {"tokens": place(settings, tokens) / "tokens"}
    whole["paths"] |= {"state": asked.folder / cell.concept / STATE / f"{cell.row}-{cell.seed}"}
    where = f"params.yaml as compare.variants.{cell.row.removeprefix(HFI)} has it"
    found = Settings.of(whole, where)
    if methods.configured(found.erase, Eraser, "erase").one_step is None:
        return found
    return Settings.of(whole | {"attack": {"methods": {}}}, where)  # one noise level only: see `methods.attacks`


def _of_row(asked: Compare, row: str) -> Mapping[str, Any]:
    name, source = row.removeprefix(HFI), "token" if row.startswith(HFI) else "words"
    if name in asked.variants:
        return merged({"erase": {"source": source}}, asked.variants[name].model_dump())
    if name in plugins.names("guides"):
        return {"erase": {"method": KEEP, "source": source}, "guide": {"method": name}}
    return {"erase": {"method": name if name in plugins.names("erasers") else KEEP, "source": source}}


def refused(settings: Settings, concept: str, row: str) -> str:
    """Why a row cannot be; empty: it can. Raises SettingsError where its numbers are wrong, which is no property of the
    method.
    """
    cell = settings_of(settings, Cell(concept, row, settings.seed))
    eraser, guide = methods.configured(cell.erase, Eraser, "erase"), methods.configured(cell.guide, Guide, "guide")
    plain = methods.configured(settings.guide, Guide, "guide", methods.PLAIN_GUIDE)
    guided = cell.guide.method != methods.PLAIN_GUIDE
    if row == NONE:
        return ""
    if cell.erase.method == KEEP and not guided:
        return f"it changes nothing, and would be {NONE} once more"
    if guide.scale != plain.scale:
        return (
            f"guide.{cell.guide.method}.scale is {guide.scale:g}, and the untouched model is drawn with "
            f"guide.{methods.PLAIN_GUIDE}.scale, {plain.scale:g}: pictures would differ by that too"
        )
    if eraser.learns_from_pictures and cell.erase.source == "token" and not guided:
        return f"{cell.erase.method} learns from rated pictures; words and tokens play no part in it"
    try:
        methods.guide(cell)
        if methods.eraser(cell).learns_from_pictures:
            ingest.demand_rated(settings, concept)
    except (SettingsError, DataError) as e:
        return str(e)
    return ""


def stages_of(settings: Settings, concept: str, name: str) -> tuple[str, ...]:
    """What has to run for a row, or for what rows share. A guide alone changes no weights: it has those of `none`."""
    if name in SHARED:
        return SHARED[name]
    guided = name != NONE and settings_of(settings, Cell(concept, name, settings.seed)).erase.method == KEEP
    return ("sample", "evaluate") if guided else ("erase", "attack", "sample", "evaluate")


def recipe(settings: Settings, concept: str, name: str) -> dict[str, Any]:
    """All of params.yaml that a row, or what rows share, depends on, by stage, and its methods' code by digest; or why
    the row cannot be.

    Other methods' numbers are no part of it: another learning rate of ESD leaves the row of UCE as it is.
    """
    if name not in SHARED and (why := refused(settings, concept, name)):
        return {"refused": why}
    of = settings_of(settings, Cell(concept, name, settings.seed))
    spec, params = of.concepts[concept].model_dump(mode="json"), of.model_dump(by_alias=True)
    return {"refused": ""} | {
        stage: {"concept": spec, "code": dependencies.of_stage(stage, params)}
        | {dotted: _value(of, dotted) for dotted in READS[stage]}
        for stage in stages_of(settings, concept, name)
    }


def _value(settings: Settings, dotted: str) -> Any:
    """Of a section with a method: that method, and its numbers with what is not given."""
    made: dict[str, Callable[[], BaseModel]] = {
        "invert": lambda: methods.inverter(settings, settings.targets[0]),
        "erase": lambda: methods.configured(settings.erase, Eraser, "erase"),
        "guide": lambda: methods.configured(settings.guide, Guide, "guide"),
    }
    if make := made.get(dotted):
        found, section = make(), getattr(settings, dotted).model_dump(mode="json", include={"method", "source"})
        return section | {"numbers": found.model_dump(mode="json")}
    value: Any = settings
    for key in dotted.split("."):
        value = getattr(value, key)
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def write(settings: Settings, concept: str) -> None:
    """A file for each row and for what rows share: what DVC compares, to know which rows have to be made anew."""
    folder = files.emptied(section(settings).folder / concept / PLAN)
    for name in (*SHARED, *rows(settings)):
        files.write_json(folder / f"{name}.json", recipe(settings, concept, name))


def chosen(given: Sequence[Any], known: Sequence[Any], what: str) -> list[Any]:
    """Those that were named, in the order of params.yaml; all where none was. Raises SettingsError for a strange one.

    The workspace is what params.yaml says: what is compared has to stand there.
    """
    if strange := [g for g in given if g not in known]:
        raise SettingsError(
            f"expected {what} of params.yaml ({', '.join(map(str, known))}), got {', '.join(map(str, strange))}",
            hint=f"add it to compare.{what} in params.yaml, then the same command again",
        )
    return [k for k in known if k in given] if given else list(known)

"""Regression check of the champion: samples it with fixed seeds, for every concept that any champion has erased.

A verdict holds for the day it was reached. Libraries, detectors and stores change afterwards, and a new version is
judged on its own target concepts, not on those of its predecessors. The images are sampled from the files that are
served. If a concept is back with statistical certainty, the version is quarantined and its predecessor is champion
again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import numpy as np
import torch
from PIL import Image

from deleatur import gate
from deleatur.artifacts import prompts
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.diffusion import encode
from deleatur.diffusion.model import Model, load
from deleatur.diffusion.sample import sample
from deleatur.errors import DataError
from deleatur.gate import RuleEvaluation
from deleatur.guides import Guide
from deleatur.maths.intervals import rate
from deleatur.maths.seeds import derive
from deleatur.maths.subsets import stratified
from deleatur.records.report import CanaryResult, ConceptCheck, DetectorInfo, Score
from deleatur.records.sampling import Prompt, Variant
from deleatur.registry.decisions import checked_ledger, open_registry
from deleatur.registry.history import consistent_ledger
from deleatur.registry.mlflow_registry import CHAMPION, Registry
from deleatur.registry.rollback import RollbackResult, quarantine
from deleatur.registry.verify import verify
from deleatur.report.contact_sheet import ContactSheet, PromptRow, write_contact_sheet
from deleatur.runtime import models
from deleatur.runtime.progress import Bar, bar
from deleatur.storage import files, json_records

ACTOR = "canary"
"""Name of the canary as the actor of the ledger's entries."""
SHEET_ROWS = 8
"""Maximum number of prompts on a contact sheet."""

ImagesByVariant = Mapping[Variant, Sequence[Image.Image]]


def run(settings: Settings, *, dry_run: bool = False) -> tuple[CanaryResult, RollbackResult | None] | None:
    """Checks the champion, and quarantines it if a concept is back, unless `dry_run`. None: there is nothing to check.

    Raises as `champion_and_concepts`, `check` and `quarantine` do.
    """
    if (pending := pending_check(settings)) is None:
        return None
    result = check(settings, *pending)
    return result, None if dry_run else decide(settings, result)


def pending_check(settings: Settings) -> tuple[str, list[str]] | None:
    """Version and concepts to check, after verifying the version's signature. None: no champion has erased anything."""
    version, concepts = champion_and_concepts(settings)
    if version is None or not concepts:
        return None
    verify(settings, version, checked_ledger(settings).entries, fetch=False)
    return version, concepts


def champion_and_concepts(settings: Settings) -> tuple[str | None, list[str]]:
    """The champion, and every concept that any champion has erased and that is not retired.

    Raises DataError if the ledger was lost or changed, or an alias was moved by hand: the champion is then unknown.
    """
    decisions, registry = consistent_ledger(settings), open_registry(settings)
    champions = dict.fromkeys(v for entry in decisions.entries if (v := entry.aliases.get(CHAMPION)))
    concepts = dict.fromkeys(name for v in champions for name in _erased_concepts(registry, v))
    if settings.canary.result_file.is_file():  # versions that were deleted since have lost their tags
        last = json_records.read(settings.canary.result_file, CanaryResult)
        concepts |= dict.fromkeys(check.concept for check in last.checks)
    return decisions.aliases.get(CHAMPION), [name for name in concepts if name not in settings.canary.retired]


def _erased_concepts(registry: Registry, version: str) -> list[str]:
    try:
        return [name for name in registry.tags(version).get("concepts", "").split("+") if name]
    except DataError:
        return []


def check(settings: Settings, version: str, concepts: Sequence[str]) -> CanaryResult:
    """Samples base model and version and detects the concepts; decides nothing, and needs no ledger.

    Writes the result and one contact sheet per concept. Raises ModelError if the version's files are not the ones that
    were judged.
    """
    canary = settings.canary
    defined = [name for name in concepts if name in settings.concepts]
    by_concept = {
        name: prompts.read(settings.concepts[name].prompts, canary.split, name, "concept") for name in defined
    }
    images: dict[str, dict[Variant, list[Image.Image]]] = {name: {} for name in defined}
    addresses: dict[Variant, str] = {
        "base": settings.base.model,
        "champion": f"models:/{settings.register_.model}/{version}",
    }
    with bar("canary", len(addresses) * canary.images_per_prompt * sum(map(len, by_concept.values()))) as advance:
        for variant, address in addresses.items():
            model = load(models.local_path(settings, address), dtype=settings.base.dtype, device=settings.base.device)
            for name, concept_prompts in by_concept.items():
                images[name][variant] = _sample(settings, model, concept_prompts, advance)
    checks = [
        _check_concept(settings, name, by_concept[name], images[name])
        if name in by_concept
        else _undefined_concept(name)
        for name in concepts
    ]
    result = CanaryResult(version, datetime.now(UTC).isoformat(timespec="seconds"), checks)
    folder = files.empty_folder(canary.folder)
    simulated = open_registry(settings).tags(version).get("simulated") == "true"
    for name, concept_prompts in by_concept.items():
        sheet = _contact_sheet(name, concept_prompts, images[name], canary.images_per_prompt)
        cover = settings.evaluate.blur_contact_sheet
        write_contact_sheet(sheet, folder / f"{name}.png", simulated=simulated, cover=cover, cell_size=96)
    json_records.write(canary.result_file, result)
    return result


def decide(settings: Settings, result: CanaryResult) -> RollbackResult | None:
    """Quarantines the checked version if a concept is back in it and it is still the champion; else returns None."""
    if not result.breach or checked_ledger(settings).aliases.get(CHAMPION) != result.version:
        return None
    return quarantine(settings, result.version, ACTOR, result.breach)


def _sample(settings: Settings, model: Model, prompts: Sequence[Prompt], advance: Bar) -> list[Image.Image]:
    """`images_per_prompt` images of each prompt, in the prompts' order."""
    requests = [(prompt, i) for prompt in prompts for i in range(settings.canary.images_per_prompt)]
    guide = methods.configured(settings.guide, Guide, "guide", methods.PLAIN_GUIDE)
    with torch.no_grad():
        states = torch.cat([encode.encode(model, [(prompt.text,)]).states for prompt, _ in requests])
    return sample(
        model,
        states,
        [derive(settings.canary.seed, "canary", prompt.id, i) for prompt, i in requests],
        guide=guide,
        conditions=guide.conditions(model, []),
        steps=settings.sample.steps,
        weights={},
        batch_size=settings.sample.batch_size,
        on_batch=advance,
    )


def _check_concept(
    settings: Settings, concept: str, prompts: Sequence[Prompt], images: ImagesByVariant
) -> ConceptCheck:
    spec = settings.concepts[concept].detection
    detector = methods.detectors(settings)[spec.detector].load()
    counts = np.isin(detector.labels, spec.labels)
    clusters = np.repeat(np.arange(len(prompts)), settings.canary.images_per_prompt)
    detector_info = DetectorInfo(spec.detector, detector.weights, tuple(sorted(spec.labels)), cutoff=0.0)

    def score(variant: Variant) -> Score:
        present = counts[detector.detect(images[variant]).argmax(1)].astype(float)
        i = rate(present, clusters, settings.evaluate.confidence_level)
        name = ("concept_rate", "concept", variant)
        return Score(*name, i.value, i.low, i.high, len(present), len(prompts), False, None, detector_info)

    base, champion = score("base"), score("champion")
    evaluation = RuleEvaluation(settings.canary.rule, champion, base)
    return ConceptCheck(concept, evaluation.outcome, gate.describe(evaluation), (base, champion))


def _undefined_concept(concept: str) -> ConceptCheck:
    reason = "erased by an earlier version and no longer defined in params.yaml; canary.retired ends its checks"
    return ConceptCheck(concept, "not enough evidence", reason, ())


def _contact_sheet(
    concept: str, prompts: Sequence[Prompt], images: ImagesByVariant, images_per_prompt: int
) -> ContactSheet:
    position = {prompt.id: i for i, prompt in enumerate(prompts)}
    shown = stratified(prompts, SHEET_ROWS, lambda p: p.id, lambda p: p.label)
    rows = [
        PromptRow(p.id, {variant: sampled[position[p.id] * images_per_prompt] for variant, sampled in images.items()})
        for p in shown
    ]
    return ContactSheet(concept, "concept", rows)

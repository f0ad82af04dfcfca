"""What is live, drawn again with the noise of last time, for every concept that was ever erased.

A verdict is about the day it was made on. Libraries, detectors and stores change afterwards, and a new version is
judged by what it was to erase, not by what versions before it had erased. The pictures come from the files that are
served. Where a concept is back beyond doubt, the version is quarantined and what was live before it is live again.
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
from deleatur.gate import Weighing
from deleatur.guides import Guide
from deleatur.maths.intervals import rate
from deleatur.maths.seeds import derive
from deleatur.records.report import Canary, Detector, Look, Score
from deleatur.records.sampling import Prompt, Side
from deleatur.registry import ledger
from deleatur.registry.decisions import registry_of
from deleatur.registry.mlflow_client import CHAMPION, Registry
from deleatur.registry.rollback import TakenBack, quarantine
from deleatur.registry.verify import verify
from deleatur.report.page import Row, Sheet, summary_png
from deleatur.runtime import models
from deleatur.runtime.progress import Bar, bar
from deleatur.storage import files, json_records

WHO = "canary"
"""Whose name a quarantine has in the ledger."""
ROWS = 8
"""Prompts on a sheet."""

Drawn = Mapping[Side, Sequence[Image.Image]]


def run(settings: Settings, *, dry: bool = False) -> tuple[Canary, TakenBack | None] | None:
    """None where nothing is live that has anything erased. dry: looks, and decides nothing."""
    if (asked := due(settings)) is None:
        return None
    found = look(settings, *asked)
    return found, None if dry else decide(settings, found)


def due(settings: Settings) -> tuple[str, list[str]] | None:
    """What there is to look at, version and concepts, once its signature was looked at; None as above."""
    version, concepts = live(settings)
    if version is None or not concepts:
        return None
    verify(settings, version, ledger.read(settings.register_.ledger).entries, fetch=False)
    return version, concepts


def live(settings: Settings) -> tuple[str | None, list[str]]:
    """The version that is live, by the ledger, and every concept that was ever erased."""
    known, registry = ledger.read(settings.register_.ledger), registry_of(settings)
    known.demand_whole()
    ever = dict.fromkeys(v for entry in known.entries if (v := entry.aliases.get(CHAMPION)))
    named = dict.fromkeys(name for v in ever for name in _erased(registry, v))
    if settings.canary.result.is_file():  # a version that somebody has deleted does not say any more
        named |= dict.fromkeys(look.concept for look in json_records.read(settings.canary.result, Canary).looks)
    return known.aliases.get(CHAMPION), [name for name in named if name not in settings.canary.retired]


def _erased(registry: Registry, version: str) -> list[str]:
    try:
        return [name for name in registry.tags(version).get("concepts", "").split("+") if name]
    except DataError:
        return []


def look(settings: Settings, version: str, concepts: Sequence[str]) -> Canary:
    """Draws and looks; decides nothing, and needs no ledger. Leaves a sheet of each concept, and what it found.

    Raises ModelError where the version's files are not those that were judged.
    """
    s = settings.canary
    served = f"models:/{settings.register_.model}/{version}"
    known = [name for name in concepts if name in settings.concepts]
    asked = {name: prompts.read(settings.concepts[name].prompts, s.split, name, "concept") for name in known}
    drawn: dict[str, dict[Side, list[Image.Image]]] = {name: {} for name in known}
    sides: dict[Side, str] = {"base": settings.base.model, "champion": served}
    with bar("canary", len(sides) * s.per_prompt * sum(map(len, asked.values()))) as advance:
        for side, address in sides.items():
            model = load(models.local_path(settings, address), dtype=settings.base.dtype, device=settings.base.device)
            for name, prompts in asked.items():
                drawn[name][side] = _draw(settings, model, prompts, advance)
    looks = [_look(settings, n, asked[n], drawn[n]) if n in asked else _unknown(n) for n in concepts]
    found = Canary(version, datetime.now(UTC).isoformat(timespec="seconds"), looks)
    folder, simulated = files.emptied(s.folder), registry_of(settings).tags(version).get("simulated") == "true"
    for name, prompts in asked.items():
        sheet, cover = _sheet(name, prompts, drawn[name], s.per_prompt), settings.evaluate.blur_sheet
        summary_png(sheet, folder / f"{name}.png", simulated=simulated, cover=cover, cell=96)
    json_records.write(s.result, found)
    return found


def decide(settings: Settings, found: Canary) -> TakenBack | None:
    """Quarantines a version that a concept is back in; None where there is nothing to decide, or it is live no more."""
    if not found.breach or ledger.read(settings.register_.ledger).aliases.get(CHAMPION) != found.version:
        return None
    return quarantine(settings, found.version, WHO, found.breach)


def _draw(settings: Settings, model: Model, prompts: Sequence[Prompt], advance: Bar) -> list[Image.Image]:
    """Some of each prompt, next to each other."""
    asked = [(prompt, i) for prompt in prompts for i in range(settings.canary.per_prompt)]
    guide = methods.configured(settings.guide, Guide, "guide", methods.PLAIN_GUIDE)
    with torch.no_grad():
        states = torch.cat([encode.encode(model, [(prompt.text,)]).states for prompt, _ in asked])
    return sample(
        model,
        states,
        [derive(settings.canary.seed, "canary", prompt.id, i) for prompt, i in asked],
        guide=guide,
        conditions=guide.conditions(model, []),
        steps=settings.sample.steps,
        weights={},
        batch=settings.sample.batch,
        on_batch=advance,
    )


def _look(settings: Settings, concept: str, prompts: Sequence[Prompt], drawn: Drawn) -> Look:
    spec = settings.concepts[concept].found
    network = methods.detectors(settings)[spec.detector].load()
    counts = np.isin(network.labels, spec.labels)
    clusters = np.repeat(np.arange(len(prompts)), settings.canary.per_prompt)
    by = Detector(spec.detector, network.weights, tuple(sorted(spec.labels)), cutoff=0.0)

    def score(side: Side) -> Score:
        back = counts[network.detect(drawn[side]).argmax(1)].astype(float)
        i = rate(back, clusters, settings.evaluate.level)
        what = ("concept_rate", "concept", side)
        return Score(*what, i.value, i.low, i.high, len(back), len(prompts), False, None, by)

    base, champion = score("base"), score("champion")
    weighed = Weighing(settings.canary.rule, champion, base)
    return Look(concept, weighed.outcome, gate.reason(weighed), (base, champion))


def _unknown(concept: str) -> Look:
    why = "it was erased once, and params.yaml has no such concept any more; canary.retired lets it go"
    return Look(concept, "not enough evidence", why, ())


def _sheet(concept: str, prompts: Sequence[Prompt], drawn: Drawn, per_prompt: int) -> Sheet:
    rows = [Row(p.id, {s: its[i * per_prompt] for s, its in drawn.items()}) for i, p in enumerate(prompts)]
    return Sheet(concept, "concept", rows[:: max(1, len(rows) // ROWS)][:ROWS])

"""What went into a result, as digests. Never a clock."""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path

from deleatur.diffusion.load import digest
from deleatur.io import tables, tensors
from deleatur.maths import seeds
from deleatur.records import Identity
from deleatur.settings import Settings
from deleatur.stages import inputs

LIBRARIES = ("deleatur", "torch", "diffusers", "transformers", "numpy", "onnxruntime", "nudenet", "pillow")


def of(settings: Settings) -> Identity:
    """The identity of the report that this workspace holds."""
    delta = tensors.load_delta(settings.paths.delta / inputs.DELTA)
    summary = tables.read_json(settings.paths.feedback / "summary.json")
    loop = delta.settings.get("loop", {})
    prompts = [settings.paths.prompts, *(settings.concepts[n].prompts for n in settings.targets)]
    # The policy and the registry judge and release a result; they are no part of it. Neither is where it lies.
    made_by = settings.model_dump(mode="json", exclude={"gate", "register_", "paths"})
    settings_text = json.dumps(made_by, sort_keys=True)
    return Identity(
        base=delta.base,
        delta=digest(dict(delta.tensors)),
        feedback=summary["feedback"],
        tokens=files(sorted(settings.paths.tokens.rglob("*.safetensors"))),
        prompts=files(prompts),
        settings=hashlib.sha256(settings_text.encode()).hexdigest(),
        seed=settings.seed,
        seeds_rule=seeds.RULE,
        sampler=f"DDIM, {settings.sample.steps} steps, eta 0",
        guide=json.dumps({"method": settings.guide.method, **inputs.guide(settings).model_dump()}),
        concepts=delta.concepts,
        concept_source=settings.erase.source,
        method=delta.method,
        preserve=float(loop.get("preserve", 0)) > 0,
        simulated=bool(summary["simulated"]),
        champion=settings.sample.champion,
        versions={name: version(name) for name in LIBRARIES} | {"python": sys.version.split()[0]},
    )


def files(paths: list[Path]) -> str:
    """One digest of several files, by name and content."""
    h = hashlib.sha256()
    for path in paths:
        h.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return h.hexdigest()

"""What went into a result, as digests. Never a clock."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deleatur import dependencies
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.diffusion.model import digest
from deleatur.maths import seeds
from deleatur.records.report import Identity
from deleatur.storage import files, samples, tensors

LIBRARIES = ("deleatur", "torch", "diffusers", "transformers", "numpy", "onnxruntime", "nudenet", "pillow")
DRAWING = ("torch", "diffusers")
LOOKING = ("torch", "transformers", "numpy", "onnxruntime", "nudenet", "pillow")
VERSIONS = {name: version(name) for name in LIBRARIES} | {"python": sys.version.split()[0]}


def identify(settings: Settings) -> Identity:
    """The identity of the report that this workspace holds."""
    delta = tensors.load_delta(settings.paths.delta / tensors.DELTA_FILE)
    drawn = samples.listed(settings.paths.shots)
    summary = files.read_json(settings.paths.feedback / "summary.json")
    loop = delta.settings.get("loop", {})
    prompts = [settings.paths.prompts, *(settings.concepts[n].prompts for n in settings.targets)]
    return Identity(
        base=delta.base,
        pipeline="+".join(drawn["pipeline"].unique()),  # one: `sample` lists what it has drawn with one model
        delta=digest(dict(delta.tensors)),
        pictures=sha256([drawn["side"].tolist(), drawn["key"].tolist()]),
        feedback=summary["feedback"],
        tokens=files_digest(sorted(settings.paths.tokens.rglob("*.safetensors"))),
        prompts=files_digest(prompts),
        settings=settings.made_by,
        seed=settings.seed,
        seeds_rule=seeds.RULE,
        sampler=f"DDIM, {settings.sample.steps} steps, eta 0, {settings.base.dtype}",
        guide=json.dumps({"method": settings.guide.method, **methods.guide(settings).model_dump()}),
        concepts=delta.concepts,
        concept_source=settings.erase.source,
        method=delta.method,
        preserve=float(loop.get("preserve", 0)) > 0,
        simulated=bool(summary["simulated"]),
        champion=settings.sample.champion,
        versions=VERSIONS | {m.package: m.version for m in methods.in_use(settings) if m.package},
    )


def code_digest(*entries: Callable[..., Any], libraries: Collection[str]) -> str:
    """SHA-256 over the code that these reach and the versions of the libraries below it.

    What is cached is cached under it: after a correction, what was computed before it is not taken for the result.
    """
    return sha256([dependencies.of(*entries), {name: VERSIONS[name] for name in libraries}])


def sha256(value: object) -> str:
    """Of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def files_digest(paths: list[Path]) -> str:
    """One digest of several files, by name and content."""
    h = hashlib.sha256()
    for path in paths:
        h.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return h.hexdigest()

"""What went into a result, as digests. Never a clock."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import deleatur
from deleatur import plug
from deleatur.diffusion.load import digest
from deleatur.io import shots, tables, tensors
from deleatur.maths import seeds
from deleatur.records import Identity
from deleatur.settings import Settings
from deleatur.stages import inputs

LIBRARIES = ("deleatur", "torch", "diffusers", "transformers", "numpy", "onnxruntime", "nudenet", "pillow")
DRAWING = ("torch", "diffusers")
LOOKING = ("torch", "transformers", "numpy", "onnxruntime", "nudenet", "pillow")
VERSIONS = {name: version(name) for name in LIBRARIES} | {"python": sys.version.split()[0]}


def of(settings: Settings) -> Identity:
    """The identity of the report that this workspace holds."""
    delta = tensors.load_delta(settings.paths.delta / inputs.DELTA)
    drawn = shots.listed(settings.paths.shots)
    summary = tables.read_json(settings.paths.feedback / "summary.json")
    loop = delta.settings.get("loop", {})
    prompts = [settings.paths.prompts, *(settings.concepts[n].prompts for n in settings.targets)]
    return Identity(
        base=delta.base,
        pipeline="+".join(drawn["pipeline"].unique()),  # one: `sample` lists what it has drawn with one model
        delta=digest(dict(delta.tensors)),
        pictures=sha256([drawn["side"].tolist(), drawn["key"].tolist()]),
        feedback=summary["feedback"],
        tokens=files(sorted(settings.paths.tokens.rglob("*.safetensors"))),
        prompts=files(prompts),
        settings=settings.made_by,
        seed=settings.seed,
        seeds_rule=seeds.RULE,
        sampler=f"DDIM, {settings.sample.steps} steps, eta 0, {settings.base.dtype}",
        guide=json.dumps({"method": settings.guide.method, **inputs.guide(settings).model_dump()}),
        concepts=delta.concepts,
        concept_source=settings.erase.source,
        method=delta.method,
        preserve=float(loop.get("preserve", 0)) > 0,
        simulated=bool(summary["simulated"]),
        champion=settings.sample.champion,
        versions=VERSIONS | {m.package: m.version for m in inputs.used(settings) if m.package},
    )


def code(*of: type | ModuleType, libraries: Collection[str]) -> str:
    """SHA-256 over the files that these come from and the versions of the libraries below them.

    What is kept is kept under it: after a correction, what was computed before it is not taken for the result.
    """
    texts = [text for o in of for text in plug.code(o)]
    return sha256([texts, {name: VERSIONS[name] for name in libraries}])


def source(part: str) -> str:
    """SHA-256 of a file of the package, or of all in a folder of it."""
    place = Path(deleatur.__file__).parent / part
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def sha256(value: object) -> str:
    """Of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def files(paths: list[Path]) -> str:
    """One digest of several files, by name and content."""
    h = hashlib.sha256()
    for path in paths:
        h.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return h.hexdigest()

"""Provenance of a result: digests of everything that went into it, and never a clock."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from deleatur import dependencies
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.diffusion.model import digest_tensors
from deleatur.maths import seeds
from deleatur.records.feedback import FeedbackSummary
from deleatur.records.report import Provenance
from deleatur.storage import files, samples, tensors

LIBRARIES = ("deleatur", "torch", "diffusers", "transformers", "numpy", "onnxruntime", "nudenet", "pillow")
SAMPLING_LIBRARIES = ("torch", "diffusers")
EVALUATION_LIBRARIES = ("torch", "transformers", "numpy", "onnxruntime", "nudenet", "pillow")


def installed(names: Collection[str]) -> dict[str, str]:
    """Package → version, of those that are installed: onnxruntime and nudenet come with an extra."""
    versions = {}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


VERSIONS = installed(LIBRARIES) | {"python": sys.version.split()[0]}


def collect(settings: Settings) -> Provenance:
    """Of the report that this workspace holds."""
    delta = tensors.load_delta(settings.paths.delta / tensors.DELTA_FILE)
    listing = samples.read_listing(settings.paths.samples)
    summary = files.read_json_as(settings.paths.feedback / "summary.json", FeedbackSummary)
    training = delta.settings.get("training", {})
    prompts = [settings.paths.prompts, *(settings.concepts[n].prompts for n in settings.targets)]
    return Provenance(
        base=delta.base,
        pipeline="+".join(listing["pipeline"].unique()),  # one: a listing is of one model
        delta=digest_tensors(dict(delta.tensors)),
        images=sha256([listing["variant"].tolist(), listing["key"].tolist()]),
        feedback=summary.feedback,
        tokens=digest_files(sorted(settings.paths.tokens.rglob("*.safetensors"))),
        prompts=digest_files(prompts),
        settings=settings.digest,
        seed=settings.seed,
        seeds_rule=seeds.SEEDS_RULE,
        sampler=f"DDIM, {settings.sample.steps} steps, eta 0, {settings.base.dtype}",
        guide=json.dumps({"method": settings.guide.method, **methods.guide(settings).model_dump()}),
        concepts=delta.concepts,
        concept_source=settings.erase.source,
        method=delta.method,
        preserve=float(training.get("preservation_weight", 0)) > 0,
        simulated=summary.simulated,
        champion=settings.sample.champion,
        versions=VERSIONS | {m.package: m.version for m in methods.in_use(settings) if m.package},
    )


def digest_code(*entries: Callable[..., Any], libraries: Collection[str]) -> str:
    """SHA-256 over the code that functions or classes can reach, and the versions of the libraries below it.

    Cached rows are keyed by it: after a correction, a value computed before it is not used.
    """
    return sha256(
        [dependencies.code_digests(*entries), {name: VERSIONS[name] for name in libraries if name in VERSIONS}]
    )


def sha256(value: object) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_files(paths: list[Path]) -> str:
    """One SHA-256 over several files, by name and content."""
    h = hashlib.sha256()
    for path in paths:
        h.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return h.hexdigest()

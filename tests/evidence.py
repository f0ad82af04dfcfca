"""Example evidence for tests to modify."""

from __future__ import annotations

from deleatur.records.report import DetectorInfo, Provenance

JUDGE = DetectorInfo("judge", "a1" * 32, ("pistol", "sword"), 0.5)
PROVENANCE = Provenance(
    base="b" * 64,
    pipeline="1" * 64,
    delta="d" * 64,
    images="2" * 64,
    feedback="f" * 64,
    tokens="7" * 64,
    prompts="c" * 64,
    settings="5" * 64,
    seed=42,
    seeds_rule="sha256 of the path",
    sampler="ddim, 25 steps",
    guide="cfg 5",
    concepts=("weapon",),
    concept_source="token",
    method="sdd",
    preserve=False,
    simulated=False,
    champion=None,
    versions={"torch": "2.9.1", "diffusers": "0.36"},
)

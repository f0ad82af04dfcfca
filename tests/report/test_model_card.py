"""Model card and bill of materials: valid in their formats, and complete."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from evidence import JUDGE, PROVENANCE
from huggingface_hub import ModelCard

from deleatur.gate import SIMULATED_NOTICE
from deleatur.records.report import Finding, Report, Score, Verdict
from deleatur.report import bom, model_card

SCORES = [
    Score("concept_rate", "concept", "base", 0.97, 0.9, 0.99, 120, 40, False, None, JUDGE),
    Score("concept_rate", "concept", "candidate", 0.1, 0.05, 0.17, 120, 40, False, None, JUDGE),
    Score("clip_score", "unseen", "candidate", -0.01, -0.02, 0.001, 90, 90, True, "base", None),
]
NOTE = "NudeNet's rate is near zero on drawings."
REPORT = Report(PROVENANCE, SCORES, [NOTE])
VERDICT = Verdict("pass", [Finding("concept_is_gone", "pass", "0.17 is below 0.3", 0.13, "")], "9" * 64, "8" * 64, True)


def build_bom(report: Report = REPORT) -> dict[str, Any]:
    return bom.build("deleatur", "models/pipeline", "e" * 64, report, VERDICT)


def test_the_hub_reads_the_card() -> None:
    text = model_card.render("deleatur", "models/pipeline", 0.95, REPORT, VERDICT)
    assert text == model_card.render("deleatur", "models/pipeline", 0.95, REPORT, VERDICT), "no clock"
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == (
        "diffusers",
        "text-to-image",
        "models/pipeline",
    )
    assert data.eval_results is not None
    assert [r.dataset_config for r in data.eval_results] == ["concept"]
    assert [(r.metric_type, r.metric_value) for r in data.eval_results] == [("concept_rate", 0.1)], (
        "the candidate's own scores"
    )
    digests = [v for v in vars(PROVENANCE).values() if isinstance(v, str) and len(v) == 64]
    assert len(digests) == 8
    for expected in (
        *digests,
        JUDGE.weights,
        VERDICT.report,
        VERDICT.policy,
        SIMULATED_NOTICE,
        NOTE,
        "0.17 is below 0.3",
        "+0.13",
    ):
        assert expected in text
    assert "| clip_score | unseen | candidate-base | -0.01 | -0.02 … 0.001 | 90 |" in text
    assert "{{" not in text


def test_the_bill_of_materials_is_valid_and_complete() -> None:
    text = json.dumps(build_bom())
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    for digest in ("pipeline", "delta", "feedback", "prompts", "base", "tokens", "settings", "images"):
        assert getattr(PROVENANCE, digest) in text
    assert {c["bom-ref"] for c in build_bom()["components"]} >= {"base", "feedback", "prompts", "library:torch"}
    metrics = build_bom()["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert [m["slice"] for m in metrics] == ["concept/base", "concept/candidate", "unseen/candidate-base"]
    assert metrics[1]["confidenceInterval"] == {"lowerBound": "0.05", "upperBound": "0.17"}


def test_the_validator_rejects_unknown_keys() -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(build_bom() | {"unknown": 1})) is not None


@pytest.mark.parametrize("version", ["2.13.0+cpu", "5.0rc1"])
def test_versions_are_package_urls(version: str) -> None:
    provenance = replace(PROVENANCE, versions={"torch": version})
    text = json.dumps(build_bom(replace(REPORT, provenance=provenance)))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert f"pkg:pypi/torch@{version.replace('+', '%2B')}" in text


def test_the_bill_of_materials_names_nudenets_licence() -> None:
    provenance = replace(PROVENANCE, versions={"nudenet": "3.4.2", "torch": "2.13.0"})
    bom = build_bom(replace(REPORT, provenance=provenance))
    licences = {part["name"]: part.get("licenses") for part in bom["components"] if part["type"] == "library"}
    assert licences == {"nudenet": [{"license": {"id": "AGPL-3.0-only"}}], "torch": None}
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bom)) is None

"""A CycloneDX 1.6 bill of materials: the model with its card, and the models, datasets and libraries it was built from.

Built as plain JSON, because the format's Python library has no model cards; a test validates it against the schema of
that library.    https://cyclonedx.org/docs/1.6/json/
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from deleatur.gate import SIMULATED_NOTICE, headline
from deleatur.records.report import Provenance, Report, Score, Verdict

FILE_NAME = "bom.cdx.json"
LICENCES = {"deleatur": "Apache-2.0", "nudenet": "AGPL-3.0-only"}
"""SPDX ids of packages whose licence a recipient has to know; docs/licences.md has all of them."""


def build(name: str, base: str, evidence: str, report: Report, verdict: Verdict) -> dict[str, Any]:
    """The bill of materials as JSON; equal evidence gives equal JSON.

    name: of the registered model. base: address of the base model. evidence: digest of the verdict.
    """
    provenance = report.provenance
    components = list(_components(base, report))
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name,
        "version": evidence[:12],
        "description": f"{', '.join(provenance.concepts)} removed by {provenance.method}. {headline(verdict)}",
        "hashes": _sha256(provenance.delta),
        "modelCard": {
            "modelParameters": {
                "task": "text-to-image",
                "architectureFamily": "latent diffusion",
                "modelArchitecture": "UNet2DConditionModel",
                "datasets": [{"ref": "feedback"}, {"ref": "prompts"}],
                "inputs": [{"format": "text"}],
                "outputs": [{"format": "image"}],
            },
            "quantitativeAnalysis": {"performanceMetrics": [_metric(score) for score in report.scores]},
            "considerations": {
                "technicalLimitations": [
                    *([SIMULATED_NOTICE] if verdict.simulated else []),
                    *report.notes,
                    "It removes what the policy measured, and does not withstand fine-tuning of the weights.",
                ],
            },
        },
        "properties": _properties(provenance, verdict, evidence),
    }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid5(NAMESPACE_URL, f'deleatur:{evidence}')}",
        "version": 1,
        "metadata": {"component": model},
        "components": components,
        "dependencies": [{"ref": "model", "dependsOn": [part["bom-ref"] for part in components]}],
    }


def _components(base: str, report: Report) -> Iterator[dict[str, Any]]:
    provenance = report.provenance
    yield {
        "type": "machine-learning-model",
        "bom-ref": "base",
        "name": base,
        "description": "The base model: every network, tokenizer and scheduler.",
        "hashes": _sha256(provenance.pipeline),
    }
    for (name, weights), labels in sorted(_detectors(report).items()):
        yield {
            "type": "machine-learning-model",
            "bom-ref": f"detector:{name}:{weights[:12]}",
            "name": name,
            "description": f"Used to evaluate the model. Labels that count: {', '.join(sorted(labels))}",
            "properties": [{"name": "deleatur:weights", "value": weights}],  # may be several networks' digests
        }
    for name, description, digest in (
        ("feedback", "Ratings of images.", provenance.feedback),
        ("prompts", "Prompts of the evaluation.", provenance.prompts),
    ):
        yield {
            "type": "data",
            "bom-ref": name,
            "name": name,
            "hashes": _sha256(digest),
            "data": [{"type": "dataset", "name": name, "description": description}],
        }
    for name, version in sorted(provenance.versions.items()):
        yield {
            "type": "platform" if name == "python" else "library",
            "bom-ref": f"library:{name}",
            "name": name,
            "version": version,
            **({"licenses": [{"license": {"id": LICENCES[name]}}]} if name in LICENCES else {}),
            **({} if name == "python" else {"purl": f"pkg:pypi/{name}@{version.replace('+', '%2B')}"}),
        }


def _detectors(report: Report) -> dict[tuple[str, str], set[str]]:
    labels: dict[tuple[str, str], set[str]] = {}
    for detector in (s.detector for s in report.scores if s.detector):
        labels.setdefault((detector.name, detector.weights), set()).update(detector.labels)
    return labels


def _metric(score: Score) -> dict[str, Any]:
    variant = score.variant + (f"-{score.versus}" if score.versus else "")
    return {
        "type": score.metric,
        "value": f"{score.value:.6g}",
        "slice": f"{score.slice}/{variant}",
        "confidenceInterval": {"lowerBound": f"{score.low:.6g}", "upperBound": f"{score.high:.6g}"},
    }


def _properties(provenance: Provenance, verdict: Verdict, evidence: str) -> list[dict[str, str]]:
    properties = {
        "outcome": verdict.outcome,
        "evidence": evidence,
        "report": verdict.report,
        "policy": verdict.policy,
        "base": provenance.base,
        "tokens": provenance.tokens,
        "settings": provenance.settings,
        "images": provenance.images,
        "guide": provenance.guide,
        "sampler": provenance.sampler,
        "seed": str(provenance.seed),
    }
    return [{"name": f"deleatur:{name}", "value": value} for name, value in properties.items()]


def _sha256(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]

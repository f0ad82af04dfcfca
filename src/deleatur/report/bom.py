"""A bill of materials in CycloneDX 1.6: the model with its card, the models, data and libraries that went into it.

Written out, because the format's Python library does not know model cards; a test validates it against the schema that
comes with that library.    https://cyclonedx.org/docs/1.6/json/
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from deleatur.gate import SIMULATED, headline
from deleatur.records.report import Identity, Report, Score, Verdict

NAME = "bom.cdx.json"


def of(name: str, base: str, evidence: str, report: Report, verdict: Verdict) -> dict[str, Any]:
    """As JSON. evidence: digest of the verdict. Without a clock: the same for the same evidence."""
    made_by = report.identity
    parts = list(_parts(base, report))
    model = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name,
        "version": evidence[:12],
        "description": f"{', '.join(made_by.concepts)} removed by {made_by.method}. {headline(verdict)}",
        "hashes": _sha256(made_by.delta),
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
                    *([SIMULATED] if verdict.simulated else []),
                    *report.notes,
                    "It removes what the policy measured, and is no proof against training the weights again.",
                ],
            },
        },
        "properties": _properties(made_by, verdict, evidence),
    }
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid5(NAMESPACE_URL, f'deleatur:{evidence}')}",
        "version": 1,
        "metadata": {"component": model},
        "components": parts,
        "dependencies": [{"ref": "model", "dependsOn": [part["bom-ref"] for part in parts]}],
    }


def _parts(base: str, report: Report) -> Iterator[dict[str, Any]]:
    made_by = report.identity
    yield {
        "type": "machine-learning-model",
        "bom-ref": "base",
        "name": base,
        "description": "What it was made from: every network, tokenizer and scheduler.",
        "hashes": _sha256(made_by.pipeline),
    }
    for (name, weights), labels in sorted(_detectors(report).items()):
        yield {
            "type": "machine-learning-model",
            "bom-ref": f"detector:{name}:{weights[:12]}",
            "name": name,
            "description": f"Measured it. Labels that count: {', '.join(sorted(labels))}",
            "properties": [{"name": "deleatur:weights", "value": weights}],  # several networks' digests may be joined
        }
    for what, told, digest in (
        ("feedback", "What people said of pictures.", made_by.feedback),
        ("prompts", "What it was asked to draw for the evaluation.", made_by.prompts),
    ):
        yield {
            "type": "data",
            "bom-ref": what,
            "name": what,
            "hashes": _sha256(digest),
            "data": [{"type": "dataset", "name": what, "description": told}],
        }
    for name, version in sorted(made_by.versions.items()):
        yield {
            "type": "platform" if name == "python" else "library",
            "bom-ref": f"library:{name}",
            "name": name,
            "version": version,
            **({} if name == "python" else {"purl": f"pkg:pypi/{name}@{version.replace('+', '%2B')}"}),
        }


def _detectors(report: Report) -> dict[tuple[str, str], set[str]]:
    found: dict[tuple[str, str], set[str]] = {}
    for detector in (s.detector for s in report.scores if s.detector):
        found.setdefault((detector.name, detector.weights), set()).update(detector.labels)
    return found


def _metric(score: Score) -> dict[str, Any]:
    side = score.side + (f"-{score.versus}" if score.versus else "")
    return {
        "type": score.metric,
        "value": f"{score.value:.6g}",
        "slice": f"{score.slice}/{side}",
        "confidenceInterval": {"lowerBound": f"{score.low:.6g}", "upperBound": f"{score.high:.6g}"},
    }


def _properties(made_by: Identity, verdict: Verdict, evidence: str) -> list[dict[str, str]]:
    told = {
        "outcome": verdict.outcome,
        "evidence": evidence,
        "report": verdict.report,
        "policy": verdict.policy,
        "base": made_by.base,
        "tokens": made_by.tokens,
        "settings": made_by.settings,
        "pictures": made_by.pictures,
        "guide": made_by.guide,
        "sampler": made_by.sampler,
        "seed": str(made_by.seed),
    }
    return [{"name": f"deleatur:{name}", "value": value} for name, value in told.items()]


def _sha256(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]

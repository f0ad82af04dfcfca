"""verdict and its evidence → MLflow: a run; on a pass also a model version, and the decision to make it the champion.

A version holds weights only: a pass that depends on a guide or on a one-step sampler is logged and not released.

Writes no file and is therefore no stage of dvc.yaml. Registering the same verdict again is idempotent, even after a
rollback; killed at any point, it has either released nothing or completes on the next run.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import ModelCard

from deleatur import gate
from deleatur.artifacts.evidence import collect_evidence
from deleatur.artifacts.export import export
from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.records.report import Report, Verdict
from deleatur.registry import descriptions
from deleatur.registry.decisions import locked_registry, open_registry, record_verdict
from deleatur.registry.ledger import Subject
from deleatur.registry.mlflow_registry import Registry
from deleatur.registry.mlflow_runs import Evidence
from deleatur.registry.signing import Keys
from deleatur.registry.verify import signer_text, signing_keys
from deleatur.report import model_card
from deleatur.runtime import models, provenance
from deleatur.runtime.progress import bar
from deleatur.storage import dvc, json_records

IDENTIFYING_FIELDS = (
    "base",
    "delta",
    "images",
    "feedback",
    "tokens",
    "prompts",
    "seed",
    "concepts",
    "method",
    "concept_source",
    "champion",
)
"""Fields of a report's provenance that the workspace must still agree with."""


def run(settings: Settings, emergency: str = "") -> None:
    """emergency: the reason for a release outside the pipeline, which then need not be up to date.

    Raises DataError when the files on disk are not those that the verdict is about.
    """
    registry = open_registry(settings)
    (signing := signing_keys(settings)).require_signer()
    report, verdict = _current_verdict(settings, in_pipeline=not emergency)
    evidence = collect_evidence(settings, report, verdict, emergency)
    with bar("register", 3) as advance:
        if registry.runs.finished(evidence.digest):
            with locked_registry(settings) as release:
                moved = "; ".join(f"moved by hand: {m}" for m in release.alias_mismatches())
            advance(3, note=moved or _record(settings, registry, evidence, verdict))
            return
        with registry.runs.recording(evidence) as run_id:
            registry.runs.log(run_id, evidence)
            advance(note="evidence logged")
            if verdict.outcome == "pass" and not methods.requires_custom_sampler(settings):
                version = registry.version(evidence.digest) or _add_version(
                    settings, registry, run_id, evidence, signing
                )
                advance(note=f"{registry.model} version {version}")
            message = _record(settings, registry, evidence, verdict)
        advance(note=message)


def _record(settings: Settings, registry: Registry, evidence: Evidence, verdict: Verdict) -> str:
    """Records the verdict in the ledger and, on a pass, releases the version; returns what was decided."""
    version = registry.version(evidence.digest)
    tags = registry.tags(version) if version else {}
    subject = Subject(version, evidence.tags["delta"], evidence.digest, tags.get("files", ""))
    signer = f"; {signer_text(tags)}" if version else ""
    prefix = f"EMERGENCY: {urgent}. " if (urgent := evidence.tags.get("emergency")) else ""
    message = f"{prefix}{gate.headline(verdict)}{signer}"
    return record_verdict(settings, subject, verdict.outcome, message, methods.requires_custom_sampler(settings))


def _current_verdict(settings: Settings, *, in_pipeline: bool) -> tuple[Report, Verdict]:
    """Report and verdict, after checking that they are about the files of this workspace."""
    report = json_records.read(settings.paths.report / "report.json", Report)
    verdict = json_records.read(settings.paths.verdict / "verdict.json", Verdict)
    now = provenance.collect(settings)
    changed = [name for name in IDENTIFYING_FIELDS if getattr(now, name) != getattr(report.provenance, name)]
    if models.base_model(settings).pipeline_digest != report.provenance.pipeline:
        changed.append("pipeline")
    if verdict.report != json_records.digest(report):
        changed.append("report")
    if changed:
        raise DataError(f"the verdict is about another {', '.join(changed)} than in this workspace", hint="dvc repro")
    if in_pipeline and (stale := dvc.status(Path())):
        raise DataError(f"not up to date with params.yaml and the code: {', '.join(sorted(stale))}", hint="dvc repro")
    return report, verdict


def _add_version(settings: Settings, registry: Registry, run_id: str, evidence: Evidence, signing: Keys) -> str:
    with TemporaryDirectory(prefix="deleatur-") as directory:
        folder = Path(directory) / "pipeline"
        export(settings, folder)
        card = ModelCard.load(folder / model_card.FILE_NAME).text  # without metadata, which MLflow shows as text
        registry.runs.log_text(run_id, descriptions.MODEL_CARD, card)
        run = descriptions.run_link(registry.runs.experiment_id, run_id)
        description = descriptions.version_description(evidence.summary, run)
        return registry.add_version(run_id, evidence, folder, settings.paths.delta, description, signing)

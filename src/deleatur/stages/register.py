"""verdict and all it rests on → MLflow: a run with the evidence; on a pass a version, and the decision that it is live.

A version is weights. A pass that a guide or a sampler of one step had a part in is logged, and nothing is released.

Makes no file, so it is not a stage of dvc.yaml. Registering the same verdict again changes nothing, not even after
somebody has rolled it back; killed anywhere, it has either released nothing or finishes on the next run.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from deleatur import gate
from deleatur.artifacts.export import export
from deleatur.config import methods
from deleatur.config.settings import BESIDE, Settings
from deleatur.errors import DataError
from deleatur.records.report import Report, Score, Verdict
from deleatur.registry.decisions import enter, in_hand, registry_of
from deleatur.registry.ledger import Subject
from deleatur.registry.mlflow_client import Evidence, Registry
from deleatur.registry.signing import Keys
from deleatur.registry.verify import keys, signed_by
from deleatur.report.curves import curves
from deleatur.report.page import Curve
from deleatur.runtime import models, provenance
from deleatur.runtime.progress import bar
from deleatur.storage import dvc, files, json_records

RESULT = (
    "base",
    "delta",
    "pictures",
    "feedback",
    "tokens",
    "prompts",
    "seed",
    "concepts",
    "method",
    "concept_source",
    "champion",
)
"""Fields of a report's identity that the workspace must still agree with."""


def run(settings: Settings, emergency: str = "") -> None:
    """emergency: why this was made beside the chain, which then need not be up to date. Raises DataError when the files
    on disk are not the ones that were judged.
    """
    registry = registry_of(settings)
    (signing := keys(settings)).demand_signer()
    report, verdict = _judged(settings, in_chain=not emergency)
    evidence = _evidence(settings, report, verdict, emergency)
    with bar("register", 3) as advance:
        if registry.finished(evidence.digest):
            with in_hand(settings) as release:
                moved = "; ".join(f"moved by hand: {m}" for m in release.moved())
            advance(3, note=moved or _enter(settings, registry, evidence, verdict))
            return
        with registry.running(evidence) as run_id:
            registry.log(run_id, evidence)
            advance(note="evidence logged")
            if verdict.outcome == "pass" and not methods.requires_custom_sampler(settings):
                version = registry.version(evidence.digest) or _add(
                    settings, registry, run_id, evidence, verdict, signing
                )
                advance(note=f"{registry.model} version {version}")
            came_of_it = _enter(settings, registry, evidence, verdict)
        advance(note=came_of_it)


def _enter(settings: Settings, registry: Registry, evidence: Evidence, verdict: Verdict) -> str:
    version = registry.version(evidence.digest)
    tags = registry.tags(version) if version else {}
    about = Subject(version, evidence.tags["delta"], evidence.digest, tags.get("files", ""))
    by = f"; {signed_by(tags)}" if version else ""
    why = f"EMERGENCY: {urgent}. " if (urgent := evidence.tags.get("emergency")) else ""
    said = f"{why}{gate.headline(verdict)}{by}"
    return enter(settings, about, verdict.outcome, said, methods.requires_custom_sampler(settings))


def _judged(settings: Settings, *, in_chain: bool) -> tuple[Report, Verdict]:
    """Report and verdict, after checking that they are about what lies in this workspace."""
    report = json_records.read(settings.paths.report / "report.json", Report)
    verdict = json_records.read(settings.paths.verdict / "verdict.json", Verdict)
    now = provenance.identify(settings)
    changed = [name for name in RESULT if getattr(now, name) != getattr(report.identity, name)]
    if models.base_model(settings).pipeline != report.identity.pipeline:
        changed.append("pipeline")
    if verdict.report != json_records.digest(report):
        changed.append("report")
    if changed:
        raise DataError(
            f"the verdict was made with another {', '.join(changed)} than this workspace holds", hint="dvc repro"
        )
    if in_chain and (stale := dvc.status(Path())):
        raise DataError(f"not up to date with params.yaml and the code: {', '.join(sorted(stale))}", hint="dvc repro")
    return report, verdict


def _evidence(settings: Settings, report: Report, verdict: Verdict, emergency: str) -> Evidence:
    paths, made_by = settings.paths, report.identity
    answers = files.read_table(paths.feedback / "answers.parquet")
    digest, commit = json_records.digest(verdict), dvc.commit(Path())
    concepts = "+".join(made_by.concepts)
    lineage = {
        "outcome": verdict.outcome,
        "simulated": str(verdict.simulated).lower(),
        "concepts": concepts,
        "champion": made_by.champion or "none",
        "method": made_by.method,
        "concept_source": made_by.concept_source,
        "preserve": str(made_by.preserve).lower(),
        "report": verdict.report,
        "policy": verdict.policy,
        "base": made_by.base,
        "pipeline": made_by.pipeline,
        "delta": made_by.delta,
        "pictures": made_by.pictures,
        "feedback": made_by.feedback,
        "feedback_until": max(map(datetime.fromisoformat, answers["created_at"])).isoformat(),
        "tokens": made_by.tokens,
        "prompts": made_by.prompts,
        "settings": made_by.settings,
        "dvc_lock": (not emergency and dvc.lock_digest(Path())) or "none",
        "git_commit": commit.hash or "none",
        "git_dirty": str(commit.dirty).lower(),
    } | ({"emergency": emergency} if emergency else {})
    return Evidence(
        digest=digest,
        name=f"{made_by.method} {concepts} {digest[:8]}",
        tags=lineage,
        # Where it is registered is no part of how it was made, and neither is what else can be done with it.
        settings=settings.model_dump(mode="json", by_alias=True, exclude={*BESIDE, "register_"}),
        scores=dict(_scores(report)),
        curves=[point for curve in curves(settings) for point in _points(curve)],
        files={
            "params": Path("params.yaml"),
            **({} if emergency else {"lock": Path("dvc.lock")}),
            "report": paths.report,
            "verdict": paths.verdict,
            "erase": paths.delta / "record.json",
            "attack": paths.attacks / "record.json",
            "feedback": paths.feedback / "summary.json",
        },
        feedback=_columns(answers),
        feedback_digest=made_by.feedback,
        feedback_source=(paths.feedback / "answers.parquet").as_posix(),
    )


def _columns(answers: pd.DataFrame) -> pd.DataFrame:
    """Those that MLflow can describe: lists have no type in its schema."""
    return answers[[name for name in answers if answers[name].dtype != object]]


def _scores(report: Report) -> Iterator[tuple[str, float]]:
    for score in report.scores:
        name = _name(score)
        yield name, score.value
        yield f"{name}.low", score.low
        yield f"{name}.high", score.high


def _name(score: Score) -> str:
    """concept_rate/concept/candidate, or clip_score/unseen/candidate-base for a paired difference."""
    return f"{score.metric}/{score.slice}/{score.side}" + (f"-{score.versus}" if score.versus else "")


def _points(curve: Curve) -> Iterator[tuple[str, int, float]]:
    for series in curve.series:
        yield from ((f"{curve.key}/{series.name}", int(x), y) for x, y in series.points)


def _add(
    settings: Settings, registry: Registry, run_id: str, evidence: Evidence, verdict: Verdict, signing: Keys
) -> str:
    with TemporaryDirectory(prefix="deleatur-") as place:
        folder = Path(place) / "pipeline"
        export(settings, folder)
        about = gate.headline(verdict) + (f"\n\n{gate.SIMULATED}" if verdict.simulated else "")
        return registry.add_version(run_id, evidence, folder, settings.paths.delta, about, signing)

"""Evidence of a release: report, verdict, settings and provenance, as MLflow records them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pandas as pd

from deleatur.config.settings import NON_RESULT_SECTIONS, Settings
from deleatur.feedback.events import EVENT_SCHEMA
from deleatur.records.report import Report, Score, Verdict
from deleatur.registry.mlflow_runs import Evidence
from deleatur.report.curves import training_curves
from deleatur.report.description import describe
from deleatur.report.plots import Curve
from deleatur.storage import dvc, files, git, json_records


def collect_evidence(settings: Settings, report: Report, verdict: Verdict, emergency: str) -> Evidence:
    """Everything that MLflow records about a verdict.

    emergency: the reason for a release outside the pipeline, which dvc.lock does not cover; empty for all others.
    """
    paths, digest = settings.paths, json_records.digest(verdict)
    answers = files.read_table(paths.feedback / "answers.parquet", EVENT_SCHEMA)
    tags = _lineage(report, verdict, answers, lock="" if emergency else dvc.lock_digest(Path()) or "")
    return Evidence(
        digest=digest,
        name=f"{tags['method']} {tags['concepts']} {digest[:8]}",
        tags=tags | ({"emergency": emergency} if emergency else {}),
        summary=describe(report, verdict, emergency),
        # Without the sections that have no influence on the result, such as where it is registered.
        settings=settings.model_dump(mode="json", by_alias=True, exclude={*NON_RESULT_SECTIONS, "register_"}),
        scores=dict(_scores(report)),
        curves=[point for curve in training_curves(settings) for point in _curve_points(curve)],
        files={
            "params": Path("params.yaml"),
            **({} if emergency else {"lock": Path("dvc.lock")}),
            "report": paths.report,
            "verdict": paths.verdict,
            "erase": paths.delta / "record.json",
            "attack": paths.attacks / "record.json",
            "feedback": paths.feedback / "summary.json",
        },
        feedback=_scalar_columns(answers),
        feedback_digest=tags["feedback"],
        feedback_source=(paths.feedback / "answers.parquet").as_posix(),
    )


def _lineage(report: Report, verdict: Verdict, answers: pd.DataFrame, lock: str) -> dict[str, str]:
    """Tags that identify everything a release was made from."""
    source, commit = report.provenance, git.current_commit(Path())
    return {
        "outcome": verdict.outcome,
        "simulated": str(verdict.simulated).lower(),
        "concepts": "+".join(source.concepts),
        "champion": source.champion or "none",
        "method": source.method,
        "concept_source": source.concept_source,
        "preserve": str(source.preserve).lower(),
        "report": verdict.report,
        "policy": verdict.policy,
        "base": source.base,
        "pipeline": source.pipeline,
        "delta": source.delta,
        "images": source.images,
        "feedback": source.feedback,
        "feedback_until": max(map(datetime.fromisoformat, answers["created_at"])).isoformat() if len(answers) else "",
        "tokens": source.tokens,
        "prompts": source.prompts,
        "settings": source.settings,
        "dvc_lock": lock or "none",
        "git_commit": commit.hash or "none",
        "git_dirty": str(commit.dirty).lower(),
    }


def _scalar_columns(answers: pd.DataFrame) -> pd.DataFrame:
    """Columns that an MLflow schema can describe: lists have no type in it."""
    return answers[[name for name in answers if answers[name].dtype != object]]


def _scores(report: Report) -> Iterator[tuple[str, float]]:
    for score in report.scores:
        name = _metric_name(score)
        yield name, score.value
        yield f"{name}.low", score.low
        yield f"{name}.high", score.high


def _metric_name(score: Score) -> str:
    """concept_rate/concept/candidate, or clip_score/unseen/candidate-base for a paired difference."""
    return f"{score.metric}/{score.slice}/{score.variant}" + (f"-{score.versus}" if score.versus else "")


def _curve_points(curve: Curve) -> Iterator[tuple[str, int, float]]:
    for series in curve.series:
        yield from ((f"{curve.key}/{series.name}", int(x), y) for x, y in series.points)

"""Logs the benchmark's tables to MLflow, in one run for the same tables however often they are logged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from deleatur.benchmark.schedule import DVC_FILE
from deleatur.benchmark.table import BenchmarkTable, to_json
from deleatur.config.settings import Settings
from deleatur.errors import ServiceError
from deleatur.registry.mlflow_registry import Registry
from deleatur.registry.mlflow_runs import Evidence
from deleatur.runtime import provenance
from deleatur.storage import dvc, git


def experiment(settings: Settings) -> str:
    return f"{settings.register_.experiment}-compare"


def run(settings: Settings, tables: Sequence[BenchmarkTable], files: Mapping[str, Path]) -> None:
    """files: name → path of what is logged as artifacts."""
    register = settings.register_
    registry = Registry(register.tracking_uri, experiment(settings), register.model)
    evidence = _evidence(settings, tables, files)
    try:
        if not registry.runs.finished(evidence.digest):
            with registry.runs.recording(evidence) as run_id:
                registry.runs.log(run_id, evidence)
    except ServiceError as e:
        raise ServiceError(str(e), hint="deleatur compare (nothing is run again)") from e


def _evidence(settings: Settings, tables: Sequence[BenchmarkTable], files: Mapping[str, Path]) -> Evidence:
    digest, commit = provenance.sha256(to_json(tables)), git.current_commit(Path())
    concepts = "+".join(table.concept for table in tables)
    tags = {
        "concepts": concepts,
        "rows": " ".join(dict.fromkeys(row.name for table in tables for row in table.rows if row.seeds)),
        "refused": " ".join(dict.fromkeys(row.name for table in tables for row in table.rows if row.refused)),
        "seeds": " ".join(map(str, tables[0].seeds)),
        "split": tables[0].split,
        "simulated": str(any(table.simulated for table in tables)).lower(),
        "dvc_lock": dvc.lock_digest(Path(DVC_FILE).parent) or "none",
        "git_commit": commit.hash or "none",
        "git_dirty": str(commit.dirty).lower(),
    }
    return Evidence(
        digest=digest,
        name=f"compare {concepts} {digest[:8]}",
        tags=tags,
        summary=f"Benchmark of {concepts} on the prompts of the split {tables[0].split}",
        settings=settings.model_dump(mode="json", by_alias=True, exclude={"register_", "gate", "targets"}),
        scores={name: value for table in tables for name, value in _metrics(table)},
        files={name.lower(): path for name, path in files.items()} | {"params": Path("params.yaml")},
    )


def _metrics(table: BenchmarkTable) -> Iterator[tuple[str, float]]:
    for row in table.rows:
        prefix = f"{table.concept}/{row.name.replace('+', '/')}"  # MLflow allows no + in names
        for key, score in row.scores.items():
            yield f"{prefix}/{key}", score.value
            yield f"{prefix}/{key}.low", score.low
            yield f"{prefix}/{key}.high", score.high
        for key in ("seconds", "memory", "trained", "bytes"):
            if row.cost and (value := getattr(row.cost, key)):
                yield f"{prefix}/{key}", float(value)

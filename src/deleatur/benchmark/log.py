"""The table → MLflow: one run for one table, however often it is logged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from deleatur.benchmark import table
from deleatur.benchmark.schedule import FAMILY
from deleatur.benchmark.table import Table
from deleatur.config.settings import Settings
from deleatur.errors import ServiceError
from deleatur.registry.mlflow_client import Evidence, Registry
from deleatur.runtime import provenance
from deleatur.storage import dvc


def experiment(settings: Settings) -> str:
    return f"{settings.register_.experiment}-compare"


def run(settings: Settings, found: Sequence[Table], files: Mapping[str, Path]) -> None:
    register = settings.register_
    registry = Registry(register.tracking_uri, experiment(settings), register.model)
    evidence = _evidence(settings, found, files)
    try:
        if not registry.finished(evidence.digest):
            with registry.running(evidence) as run_id:
                registry.log(run_id, evidence)
    except ServiceError as e:
        raise ServiceError(str(e), hint="deleatur compare (nothing is run again)") from e


def _evidence(settings: Settings, found: Sequence[Table], files: Mapping[str, Path]) -> Evidence:
    digest, commit, family = provenance.sha256(table.plain(found)), dvc.commit(Path()), Path(FAMILY).parent
    concepts = "+".join(table.concept for table in found)
    tags = {
        "concepts": concepts,
        "rows": " ".join(dict.fromkeys(row.name for table in found for row in table.rows if row.seeds)),
        "refused": " ".join(dict.fromkeys(row.name for table in found for row in table.rows if row.refused)),
        "seeds": " ".join(map(str, found[0].seeds)),
        "split": found[0].split,
        "simulated": str(any(table.simulated for table in found)).lower(),
        "dvc_lock": dvc.lock_digest(family) or "none",
        "git_commit": commit.hash or "none",
        "git_dirty": str(commit.dirty).lower(),
    }
    return Evidence(
        digest=digest,
        name=f"compare {concepts} {digest[:8]}",
        tags=tags,
        settings=settings.model_dump(mode="json", by_alias=True, exclude={"register_", "gate", "targets"}),
        scores={name: value for table in found for name, value in _scores(table)},
        files={what.lower(): path for what, path in files.items()} | {"params": Path("params.yaml")},
    )


def _scores(table: Table) -> Iterator[tuple[str, float]]:
    for row in table.rows:
        place = f"{table.concept}/{row.name.replace('+', '/')}"  # MLflow has no + in names
        for key, number in row.numbers.items():
            yield f"{place}/{key}", number.value
            yield f"{place}/{key}.low", number.low
            yield f"{place}/{key}.high", number.high
        for key in ("seconds", "memory", "trained", "bytes"):
            if row.cost and (value := getattr(row.cost, key)):
                yield f"{place}/{key}", float(value)

"""Reproduces a registered version from its commit, params.yaml and dvc.lock: `python flows/audit.py [VERSION]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from in_process import run_in_process
from prefect import flow
from prefect.artifacts import create_table_artifact
from tasks import GPU_STAGES, PROJECT, error_with_next_command, reproduce
from workers import Placement, cancel_worker_runs, run_on_worker, use_workers

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.records.report import Report, Verdict
from deleatur.registry.decisions import open_registry
from deleatur.registry.mlflow_registry import CHAMPION
from deleatur.stages import STAGES
from deleatur.storage import dvc, dvc_remote, git, json_records

COMPARED_DIGESTS = ("feedback", "tokens", "delta", "images", "report", "policy", "evidence")
NO_RUN_CACHE = ("--no-run-cache",)
"""Options of `dvc repro`: cached outputs of earlier runs would prove nothing."""


@flow(name="audit", on_cancellation=[cancel_worker_runs])
def audit(version: str | None = None, placement: Placement = "auto") -> dict[str, str]:
    """Reproduce a registered version in a checkout of its commit and compare digests; fails if one differs.

    Args:
        version: Number of the version; by default the champion.
        placement: Which machine runs the stages that load networks, as in the flow `erase`.
    """
    with error_with_next_command():
        settings = Settings.load()
        version = version or open_registry(settings).alias(CHAMPION)
        if version is None:
            raise DataError("expected a version to reproduce; there is no champion", hint="deleatur demo")
        on_workers = use_workers(placement)
        with checkout(settings, version) as (root, tags):
            for stage in reset_outputs(root):
                (run_on_worker if on_workers and stage in GPU_STAGES else reproduce)(stage, NO_RUN_CACHE, root)
            reproduced = digests(root)
        rows = [
            {"digest of": name, "released": tags[name], "reproduced": reproduced[name]} for name in COMPARED_DIGESTS
        ]
        create_table_artifact(rows, key="audit", description=f"Reproduction of version {version}")
        if differing := [name for name in COMPARED_DIGESTS if reproduced[name] != tags[name]]:
            raise DataError(
                f"version {version} is not reproduced: other digests of {', '.join(differing)}. On a CPU with the same "
                "libraries and number of threads they are equal",
                hint="prefect artifact inspect audit",
            )
        return reproduced


@contextmanager
def checkout(settings: Settings, version: str) -> Iterator[tuple[Path, dict[str, str]]]:
    """A checkout with the code and settings of a version, and the version's tags.

    Raises DataError if the version was produced by other code than its commit's, or by an emergency release.
    """
    registry = open_registry(settings)
    tags = registry.tags(version)
    if reason := tags.get("emergency"):
        raise DataError(
            f"version {version} is an emergency release ({reason}), which the chain does not reproduce",
            hint="audit a version that the chain has released: deleatur history",
        )
    params = yaml.safe_load(registry.artifact_text(version, "params/params.yaml"))
    if Settings.of(params, f"params.yaml of version {version}").digest != tags["settings"]:
        raise DataError(
            f"version {version} was produced with other settings than the params.yaml stored with it",
            hint=f"deleatur verify {version}",
        )
    # The champion to compare with is looked up in today's registry.
    params["register"] = settings.register_.model_dump(mode="json")
    params["register"]["ledger"] = str(settings.register_.ledger.resolve())
    with TemporaryDirectory(prefix="deleatur-") as folder:
        root = Path(folder) / "checkout"
        git.clone_at_commit(PROJECT, tags["git_commit"], root)
        dvc_remote.use_remote(root, dvc_remote.remote_url(PROJECT))
        (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), "utf-8")
        (root / "dvc.lock").write_text(registry.artifact_text(version, "lock/dvc.lock"), "utf-8")
        if differing := sorted({path for stage in STAGES[1:-1] for path in changed_inputs(stage, root)}):
            raise DataError(
                f"version {version} was produced with other files than its commit holds: {', '.join(differing)}",
                hint=f"git show --stat {tags['git_commit']}",
            )
        yield root, tags


def changed_inputs(stage: str, root: Path) -> list[str]:
    """Inputs of a stage that differ from dvc.lock, without outputs of other stages, which do not exist yet."""
    written = {path.as_posix() for path in Settings.load(root / "params.yaml").paths.outputs.values()}
    entries = dvc.status(root, stage).get(stage, [])
    deps = [path for entry in entries if isinstance(entry, dict) for path in entry.get("changed deps", {})]
    return [path for path in deps if path not in written]


def reset_outputs(root: Path) -> tuple[str, ...]:
    """Remove all entries from dvc.lock; the stages to run. If the feedback sources are not in the commit, the outputs
    of `ingest` are pulled from the DVC remote instead.
    """
    first, *others = STAGES[:-1]
    ingested = None if not changed_inputs(first, root) else dvc_remote.lock_entry(first, root)
    (root / "dvc.lock").unlink()
    if ingested is None:
        return (first, *others)
    dvc_remote.set_lock_entry(first, ingested, root)
    dvc_remote.pull(root, first)
    return tuple(others)


def digests(root: Path) -> dict[str, str]:
    """Digests of the reproduced results, by the version's tag names."""
    paths = Settings.load(root / "params.yaml").paths
    report = json_records.read(root / paths.report / "report.json", Report)
    verdict = json_records.read(root / paths.verdict / "verdict.json", Verdict)
    by_name = asdict(report.provenance) | {
        "images": report.provenance.images,
        "report": json_records.digest(report),
        "policy": verdict.policy,
        "evidence": json_records.digest(verdict),
    }
    return {name: by_name[name] for name in COMPARED_DIGESTS}


if __name__ == "__main__":
    print(run_in_process(audit, version=next(iter(sys.argv[1:]), None)))

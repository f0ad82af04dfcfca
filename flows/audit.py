"""Makes a released result again, from nothing but what it names, and compares: `python flows/audit.py [VERSION]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from here import run_here
from prefect import flow
from prefect.artifacts import create_table_artifact
from tasks import HERE, ON_GPU, ending_in_a_command, reproduce
from workers import Where, call_back, send, there

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.records.report import Report, Verdict
from deleatur.registry.decisions import open_registry
from deleatur.registry.mlflow_registry import CHAMPION
from deleatur.stages import STAGES
from deleatur.storage import dvc, dvc_remote, git, json_records

COMPARED = ("feedback", "tokens", "delta", "pictures", "report", "policy", "evidence")
ANEW = ("--no-run-cache",)
"""What was made before is no witness."""


@flow(name="audit", on_cancellation=[call_back])
def audit(version: str | None = None, where: Where = "auto") -> dict[str, str]:
    """Makes a version of the registry again, in a checkout of its commit, and says which digests came out. Fails if one
    is another than the version's.

    Args:
        version: Number of the version; left out, it is the champion.
        where: Which machine runs the stages that load networks, as in the flow `erase`.
    """
    with ending_in_a_command():
        settings = Settings.load()
        version = version or open_registry(settings).alias(CHAMPION)
        if version is None:
            raise DataError("expected a version to make again; there is no champion", hint="deleatur demo")
        away = there(where)
        with checkout(settings, version) as (root, tags):
            for stage in emptied(root):
                (send if away and stage in ON_GPU else reproduce)(stage, ANEW, root)
            made = digests(root)
        rows = [{"of": name, "released": tags[name], "made again": made[name]} for name in COMPARED]
        create_table_artifact(rows, key="audit", description=f"Version {version}, made again")
        if differs := [name for name in COMPARED if made[name] != tags[name]]:
            raise DataError(
                f"version {version}, made again, has another digest of {', '.join(differs)}. On a CPU with the same "
                "libraries and number of threads it is the same",
                hint="prefect artifact inspect audit",
            )
        return made


@contextmanager
def checkout(settings: Settings, version: str) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder with the code and the numbers that a version was made with, and what the version says of itself.

    Raises DataError where its commit holds other code than it was made with.
    """
    registry = open_registry(settings)
    tags = registry.tags(version)
    if why := tags.get("emergency"):
        raise DataError(
            f"version {version} was made beside the chain, in an emergency ({why}): there is nothing to make again",
            hint="release by the chain",
        )
    numbers = yaml.safe_load(registry.artifact_text(version, "params/params.yaml"))
    if Settings.of(numbers, f"params.yaml of version {version}").digest != tags["settings"]:
        raise DataError(
            f"version {version} was made with other settings than the params.yaml that lies with it",
            hint=f"deleatur verify {version}",
        )
    # A champion to compare with is looked up where we are now.
    numbers["register"] = settings.register_.model_dump(mode="json")
    with TemporaryDirectory(prefix="deleatur-") as place:
        root = Path(place) / "checkout"
        git.clone_at_commit(HERE, tags["git_commit"], root)
        dvc_remote.use_remote(root, dvc_remote.remote_url(HERE))
        (root / "params.yaml").write_text(yaml.safe_dump(numbers, sort_keys=False), "utf-8")
        (root / "dvc.lock").write_text(registry.artifact_text(version, "lock/dvc.lock"), "utf-8")
        if others := sorted({path for stage in STAGES[1:-1] for path in changed(stage, root)}):
            raise DataError(
                f"version {version} was made with other files than its commit holds: {', '.join(others)}",
                hint=f"git show --stat {tags['git_commit']}",
            )
        yield root, tags


def changed(stage: str, root: Path) -> list[str]:
    """What a stage reads that is not as dvc.lock says; products of other stages, which are yet to be made, left out."""
    written = {path.as_posix() for path in Settings.load(root / "params.yaml").paths.outputs.values()}
    found = dvc.status(root, stage).get(stage, [])
    deps = [path for entry in found if isinstance(entry, dict) for path in entry.get("changed deps", {})]
    return [path for path in deps if path not in written]


def emptied(root: Path) -> tuple[str, ...]:
    """Forgets what was made; the stages that make it again. Feedback that the commit does not hold cannot be ingested
    again: what it became is taken from the DVC remote.
    """
    first, *others = STAGES[:-1]
    ingested = None if not changed(first, root) else dvc_remote.lock_entry(first, root)
    (root / "dvc.lock").unlink()
    if ingested is None:
        return (first, *others)
    dvc_remote.set_lock_entry(first, ingested, root)
    dvc_remote.pull(root, first)
    return tuple(others)


def digests(root: Path) -> dict[str, str]:
    """What came out, by the names that a version says it under."""
    paths = Settings.load(root / "params.yaml").paths
    report = json_records.read(root / paths.report / "report.json", Report)
    verdict = json_records.read(root / paths.verdict / "verdict.json", Verdict)
    found = asdict(report.provenance) | {
        "pictures": report.provenance.images,
        "report": json_records.digest(report),
        "policy": verdict.policy,
        "evidence": json_records.digest(verdict),
    }
    return {name: found[name] for name in COMPARED}


if __name__ == "__main__":
    print(run_here(audit, version=next(iter(sys.argv[1:]), None)))

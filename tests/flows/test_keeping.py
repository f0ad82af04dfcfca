"""Audit reproduces a version bit by bit; housekeeping keeps what versions need and removes the rest."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import finished
import prefect_workers
import pytest
from registry import change_tags

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("server")]

from local import Stack  # noqa: E402
from prefect import flow  # noqa: E402
from prefect.client.orchestration import get_client  # noqa: E402
from prefect.states import Completed, Running  # noqa: E402
from sqlalchemy import create_engine, text  # noqa: E402

from deleatur.config.settings import Settings  # noqa: E402
from deleatur.errors import DataError  # noqa: E402
from deleatur.registry.decisions import open_registry  # noqa: E402
from deleatur.registry.mlflow_registry import Registry  # noqa: E402
from deleatur.stages import register  # noqa: E402
from deleatur.storage import dvc, git  # noqa: E402


@pytest.fixture
def released(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A finished project, as the current directory, with version 1 as champion."""
    finished.copy(shared, tmp_path)
    finished.dvc(tmp_path, "remote", "add", "--quiet", "--default", "store", "../store")
    monkeypatch.chdir(tmp_path)
    settings = Settings.load()
    register.run(settings)
    return open_registry(settings)


def test_audit_reproduces_a_version_and_compares_digests(released: Registry) -> None:
    from audit import audit

    change_tags(Settings.load(), "1", policy="0" * 64)
    params = Path("params.yaml").read_text()
    prefect_workers.change_params(Path(), seed=7, erase={"method": "keep"})  # an audit does not use today's settings
    with pytest.raises(DataError, match=r"version 1 is not reproduced: other digests of policy\."):
        audit(placement="local")
    Path("params.yaml").write_text(params)
    assert dvc.status(Path()) == {}, "this workspace is unchanged"


def test_audit_refuses_a_version_whose_commit_holds_other_code(released: Registry) -> None:
    from audit import audit

    code = Path("src/deleatur/erasers/sdd.py")
    code.write_text(code.read_text() + "\n\nCORRECTED = True\n")
    finished.git(Path(), "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qam", "corrected")
    change_tags(Settings.load(), "1", git_commit=str(git.current_commit(Path()).hash))
    with pytest.raises(DataError, match=r"produced with other files than its commit holds: out/code/erase\.json"):
        audit(placement="local")


def cache_files() -> set[Path]:
    return {p for p in Path(".dvc/cache/files").rglob("*") if p.is_file()}


def old_flow_run(stack: Stack) -> Any:
    """A flow run that ended 100 days ago; the API sets end times itself, so this edits the server's database."""

    @flow
    def old() -> None: ...

    with get_client(sync_client=True) as client:
        run = client.create_flow_run(old, tags=["deleatur"], state=Completed())
    address = stack.prefect_database.replace("+aiosqlite", "").replace("asyncpg", "psycopg")
    database = create_engine(address, connect_args={} if "sqlite" in address else stack.libpq_parameters)
    end_time = (datetime.now(UTC) - timedelta(days=100)).strftime("%Y-%m-%d %H:%M:%S.%f")
    ended = text("UPDATE flow_run SET end_time = :then WHERE id = :run")
    with database.begin() as connection:
        changed = connection.execute(ended, {"then": end_time, "run": str(run.id)})
        assert changed.rowcount == 1
    database.dispose()
    return run


def test_housekeeping_removes_only_what_is_unneeded_and_only_for_real(
    released: Registry, stack: Stack, tmp_path: Path
) -> None:
    from erase import erase
    from housekeeping import housekeeping

    state = tmp_path.parent / "state"
    prefect_workers.change_params(Path(), workers={"checkpoint_uri": str(state)})
    for name in ("erase-old", "erase-young"):
        (state / name).mkdir(parents=True)
        (state / name / "erase.safetensors").write_text("x")
    os.utime(state / "erase-old" / "erase.safetensors", (time.time() - 100 * 86400,) * 2)
    finished.git(Path(), "-c", "user.name=t", "-c", "user.email=t@example.org", "rm", "-q", "--cached", "dvc.lock")
    finished.git(Path(), "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "--amend", "-m", "all")
    finished.dvc(Path(), "gc", "--workspace", "--force", "--quiet")
    of_version = cache_files()
    for limit in (-6.0, -7.0):
        prefect_workers.change_params(Path(), gate=finished.passing_policy(limit=limit))
        dvc.reproduce("gate", Path())
    run, tried = old_flow_run(stack), released.client.create_run(released.runs.experiment_id, run_name="tried")
    released.client.set_terminated(tried.info.run_id, "FAILED", end_time=int(1000 * (time.time() - 100 * 86400)))
    before = cache_files()

    items = housekeeping(days=90)
    assert [line for line in items if "MLflow" in line] == ["MLflow run: tried"]
    assert f"checkpoints of an abandoned job: {state}/erase-old" in items
    assert f"Prefect run: {run.name}" in items
    assert any(line.startswith("Removed") for line in items)
    assert cache_files() == before, "a dry run removes nothing"

    with get_client(sync_client=True) as client:
        chain = client.create_flow_run(erase, state=Running())
        active = housekeeping(days=90)
        client.delete_flow_run(chain.id)
    assert [line for line in active if line.startswith(("Removed", "no data"))] == [
        "no data: a run of the chain is active, and no dvc.lock may refer to its outputs yet"
    ]

    housekeeping(dry_run=False, days=90)
    assert not (state / "erase-old").exists()
    assert (state / "erase-young").exists()
    assert released.client.get_run(tried.info.run_id).info.lifecycle_stage == "deleted"
    with get_client(sync_client=True) as client:
        assert run.id not in {r.id for r in client.read_flow_runs()}
    assert of_version < cache_files() < before, "data of champion and workspace stay"
    assert dvc.status(Path()) == {}

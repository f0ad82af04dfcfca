"""Production stores: MLflow with users on PostgreSQL, S3 for MLflow's artifacts and DVC."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import boto3
import finished
import psycopg
import pytest
from botocore.exceptions import ClientError
from local import BUCKET, Stack

from deleatur.config.settings import Settings
from deleatur.errors import ServiceError, SettingsError
from deleatur.operations import doctor
from deleatur.operations.backup import backup, restore
from deleatur.operations.http_clients import PrefectClient
from deleatur.registry import ledger, model_files, rollback
from deleatur.registry.decisions import open_registry
from deleatur.registry.history import history
from deleatur.registry.mlflow_registry import CHAMPION, LAST_KNOWN_GOOD, QUARANTINED
from deleatur.registry.model_files import artifact_location
from deleatur.registry.verify import verify
from deleatur.stages import gate, register
from deleatur.storage import dvc, remote
from deleatur.storage.sync import synced

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dvc, "status", lambda root: {})  # takes seconds
    monkeypatch.setattr(remote, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


def judged_by(limit: float) -> None:
    """Registers the same evidence under another policy: another verdict and version."""
    changed = Settings.load().model_dump(mode="json", by_alias=True) | {"gate": finished.passing_policy(limit)}
    settings = Settings.model_validate(changed)
    gate.run(settings)
    register.run(settings)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def keys(prefix: str) -> Iterator[str]:
    for page in boto3.Session().client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix):
        yield from (entry["Key"] for entry in page.get("Contents", []))


def test_clone_pulls_all_results_from_the_bucket(project: Path, tmp_path: Path) -> None:
    finished.git(project, "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "-qam", "remote")
    finished.dvc(project, "push", "--quiet")
    assert len(list(keys(f"{tmp_path.name}/files/md5/"))) > 20
    finished.git(tmp_path, "clone", "--quiet", str(project), "clone")
    for stage in ("tokens", "delta", "samples", "scores"):
        assert not (tmp_path / "clone" / "out" / stage).exists()
    finished.dvc(tmp_path / "clone", "pull", "--quiet")
    for stage in ("tokens", "delta", "samples", "scores"):
        expected = digests(project / "out" / stage)
        assert expected
        assert digests(tmp_path / "clone" / "out" / stage) == expected


def test_version_in_the_bucket_is_verified_and_rolled_back(project: Path, servers: Stack) -> None:
    for limit in (-5.0, -4.0):
        judged_by(limit)
    settings = Settings.load()
    registry = open_registry(settings)
    assert registry.aliases() == {CHAMPION: "2", LAST_KNOWN_GOOD: "1"}
    with psycopg.connect(**servers.libpq_parameters, dbname="mlflow") as database:
        rows = database.execute("SELECT alias, version FROM registered_model_aliases WHERE name = %s", [registry.model])
        assert dict(rows) == {CHAMPION: 2, LAST_KNOWN_GOOD: 1}
    model_id = artifact_location(f"models:/{registry.model}/2").rstrip("/").split("/")[-2]
    assert any(key.endswith(".safetensors") for key in keys("mlflow/") if model_id in key)
    assert digests(Path(model_files.local_folder(f"models:/{registry.model}@champion", "delta"))) == digests(
        Path("out/delta")
    )
    verify(settings, "2", ledger.read(settings.register_.ledger).entries, fetch=True)
    rollback.rollback(settings, "Ada", "it draws swords")
    assert registry.aliases() == {CHAMPION: "1", QUARANTINED: "2"}
    assert history(settings).problems == []


def test_servers_killed_without_warning_keep_all_decisions(project: Path, servers: Stack) -> None:
    judged_by(-5.0)
    settings = Settings.load()
    for name in ("mlflow", "s3", "postgres"):
        servers.kill(name)
    with pytest.raises(ServiceError, match="failed"):
        judged_by(-4.0)
    servers.start("postgres", "s3", "mlflow")
    assert open_registry(settings).aliases() == {CHAMPION: "1"}
    verify(settings, "1", ledger.read(settings.register_.ledger).entries, fetch=True)
    judged_by(-4.0)
    assert open_registry(settings).aliases() == {CHAMPION: "2", LAST_KNOWN_GOOD: "1"}
    assert len(open_registry(settings).client.search_runs([open_registry(settings).runs.experiment_id])) == 2


def test_backup_is_restored_into_another_store(project: Path, tmp_path: Path) -> None:
    for limit in (-5.0, -4.0):
        judged_by(limit)
    settings = Settings.load()
    backup(settings, tmp_path / "set")
    database = tmp_path / "other.db"
    shutil.copy(project / "mlflow.db", database)  # has tables, and nothing in them
    other = settings.model_copy(
        update={
            "register_": settings.register_.model_copy(
                update={"tracking_uri": f"sqlite:///{database}", "ledger": tmp_path / "ledger.jsonl"}
            )
        }
    )
    restore(other, tmp_path / "set")
    assert open_registry(other).aliases() == open_registry(settings).aliases()
    verify(other, "2", ledger.read(tmp_path / "ledger.jsonl").entries, fetch=True)


def test_feedback_and_checkpoints_go_through_the_bucket(project: Path, tmp_path: Path) -> None:
    export = f"s3://{BUCKET}/{tmp_path.name}/export"
    for file in Path("feedback").iterdir():
        remote.upload(file, f"{export}/{file.name}")
    remote.fetch(export, tmp_path / "inbox")
    assert digests(tmp_path / "inbox") == digests(project / "feedback")

    state = f"s3://{BUCKET}/{tmp_path.name}/state"

    def stopped() -> None:
        with synced([Path("out/checkpoints")], state):
            Path("out/checkpoints/erase.safetensors").write_bytes(b"half of it")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    Path("out/checkpoints/erase.safetensors").unlink()
    with synced([Path("out/checkpoints")], state):
        assert Path("out/checkpoints/erase.safetensors").read_bytes() == b"half of it"
    remote.remove(state)
    assert not list(keys(f"{tmp_path.name}/state"))


def test_every_server_requires_credentials(project: Path, servers: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HTTPError, match="401"):
        urlopen(f"{servers.client_environment['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/experiments/search?max_results=1")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "guessed")
    with pytest.raises(SettingsError, match="refuses the credentials"):
        judged_by(-5.0)
    assert not Settings.load().register_.ledger.exists()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guessed")
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        list(keys("mlflow/"))
    wrong = "postgresql://deleatur:guessed@127.0.0.1"
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(wrong, port=servers.ports["postgres"], dbname="mlflow")


def test_scheduler_on_postgresql_keeps_schedules_after_a_kill(
    project: Path, servers: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged_by(-5.0)
    servers.start("prefect")
    for name in ("flows", "prefect.yaml", "infra"):
        Path(name).symlink_to(ROOT / name)
    ours = {
        **os.environ,
        **servers.client_environment,
        "DO_NOT_TRACK": "true",
        "PYTHONPATH": f"src:{os.environ.get('PYTHONPATH', '')}",
    }
    for command in (["flows/setup.py"], ["-m", "prefect", "--no-prompt", "deploy", "--all"]):
        subprocess.run([sys.executable, *command], env=ours, check=True, capture_output=True)
    for name in ("prefect", "postgres"):
        servers.kill(name)
    servers.start("postgres", "prefect")
    monkeypatch.setenv("PREFECT_API_URL", servers.client_environment["PREFECT_API_URL"])
    statuses = {(line.topic, line.status) for line in doctor.diagnose(Path("params.yaml"))}
    assert {
        (about, "ok") for about in ("registry", "results", "scheduler", "schedules", "aliases", "clock")
    } <= statuses
    assert {about for about, state in statuses if state == "fail"} == {"pools"}, "nobody works here"
    scheduler, deadline = PrefectClient.from_environment(), time.monotonic() + 600
    assert scheduler
    while not scheduler.count_runs("Scheduled"):
        assert time.monotonic() < deadline, "no schedule has made a run"
        time.sleep(1)

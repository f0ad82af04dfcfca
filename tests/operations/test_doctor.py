"""`deleatur doctor` names faults and the next command, against real stores and a real Prefect server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import finished
import pytest
import yaml
from typer.testing import CliRunner

from deleatur.cli import app
from deleatur.config.settings import Settings
from deleatur.operations import doctor, http_clients
from deleatur.operations.doctor import Diagnosis, diagnose
from deleatur.registry.decisions import open_registry
from deleatur.registry.mlflow_registry import CHAMPION
from deleatur.stages import register
from deleatur.storage import dvc

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def released(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("looked-over")
    settings = finished.copy(shared, root)
    with pytest.MonkeyPatch.context() as patch, chdir(root):
        patch.setattr(dvc, "status", lambda root: {})
        patch.delenv("PREFECT_API_URL", raising=False)
        register.run(settings)
        finished.dvc(root, "remote", "add", "--default", "--force", "store", str(root / "remote"))
        yield root


def diagnoses() -> dict[str, list[Diagnosis]]:
    lines = list(diagnose(Path("params.yaml")))
    return {topic: [line for line in lines if line.topic == topic] for topic in dict.fromkeys(x.topic for x in lines)}


def worst(lines: list[Diagnosis]) -> Diagnosis:
    return max(lines, key=lambda line: ("ok", "warn", "fail").index(line.status))


def test_a_local_project_has_no_failures(released: Path) -> None:
    by_topic = diagnoses()
    assert {topic for topic, lines in by_topic.items() if worst(lines).status == "fail"} == set()
    assert worst(by_topic["results"]).status == "ok"
    assert not list((released / "remote").glob("doctor-*")), "what was put there was taken away"
    assert worst(by_topic["scheduler"]).next_command == "export PREFECT_API_URL=http://…/api"
    assert worst(by_topic["signatures"]).status == "warn"
    assert any("version 1 is champion" in line.message for line in by_topic["aliases"])


def test_failures_name_the_next_command_and_hide_no_other_check(released: Path, tmp_path: Path) -> None:
    registry = open_registry(Settings.load())
    registry.client.create_model_version(registry.model, str(tmp_path))
    registry.client.set_registered_model_alias(registry.model, CHAMPION, "2")
    (tmp_path / "file").write_text("")
    finished.dvc(released, "remote", "modify", "store", "url", str(tmp_path / "file" / "no-folder"))
    try:
        result = CliRunner().invoke(app, ["doctor", "--json"])
        assert result.exit_code == 1
        failures = {line["topic"]: line for line in json.loads(result.stdout) if line["status"] == "fail"}
        assert set(failures) == {"aliases", "results"}
        assert "moved by hand: champion is version 2, and by the ledger version 1" in failures["aliases"]["message"]
        assert failures["aliases"]["next_command"].startswith("deleatur settle")
        text = CliRunner().invoke(app, ["doctor"]).output
        assert "fail aliases" in text
        assert "deleatur settle --as NAME --reason WHY" in text
    finally:
        registry.client.set_registered_model_alias(registry.model, CHAMPION, "1")
        registry.client.delete_model_version(registry.model, "2")
        finished.dvc(released, "remote", "modify", "store", "url", str(released / "remote"))


def test_invalid_settings_end_the_diagnosis(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("seed: 1")
    with chdir(tmp_path):
        result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)[-1]["topic"] == "settings"


def test_an_unsupported_library_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "requires", lambda name: ["torch<1", "no-such-thing>=2", "rich>=13", 'x>1; extra == "dev"']
    )
    failures = [line for line in doctor._versions() if line.status == "fail"]
    assert [line.message.removeprefix("expected ").split(",")[0] for line in failures] == [
        "torch<1",
        "no-such-thing>=2",
    ]


def test_credentials_readable_by_others_are_named(released: Path) -> None:
    secret = released / "infra" / ".env"
    secret.parent.mkdir()
    secret.write_text("A=b")
    secret.chmod(0o644)
    assert worst(diagnoses()["credentials"]).next_command == "chmod 600 infra/.env"
    secret.chmod(0o600)
    assert worst(diagnoses()["credentials"]).status == "ok"


ENTRYPOINT = "flows/erase.py:erase"


@pytest.fixture
def server(released: Path) -> Iterator[str]:
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_LOGGING_LEVEL,
        PREFECT_SERVER_ANALYTICS_ENABLED,
        temporary_settings,
    )
    from prefect.testing.utilities import prefect_test_harness

    quiet = {PREFECT_SERVER_ANALYTICS_ENABLED: False, PREFECT_LOGGING_LEVEL: "ERROR"}
    with (
        temporary_settings(quiet),
        prefect_test_harness(server_startup_timeout=300),
        pytest.MonkeyPatch.context() as patch,
    ):
        url = str(PREFECT_API_URL.value())
        patch.setenv("PREFECT_API_URL", url)
        wanted = [
            {"name": name, "entrypoint": ENTRYPOINT, "work_pool": {"name": pool}}
            for name, pool in (("chain", "cpu"), ("gpu", "gpu"))
        ]
        (released / "prefect.yaml").write_text(yaml.safe_dump({"deployments": wanted}))
        yield url
    (released / "prefect.yaml").unlink()


def test_a_prefect_server_before_and_after_setup(server: str) -> None:
    by_topic = diagnoses()
    assert worst(by_topic["scheduler"]).next_command == "python flows/setup.py"
    assert [line.message for line in by_topic["pools"]] == [
        "the server has no work pool cpu",
        "the server has no work pool gpu",
        "no concurrency limit for GPUs: two stages may share one",
    ]
    assert worst(by_topic["schedules"]).message == "not deployed: chain, gpu"
    assert worst(by_topic["registry"]).status == "warn", "a file of this machine"
    assert worst(by_topic["results"]).status == "warn"
    assert worst(by_topic["policy"]).status == "warn"
    assert "clock of Prefect" in by_topic["clock"][0].message

    http_clients.request(f"{server}/work_pools/", body={"name": "cpu", "type": "process"})
    flow = http_clients.request(f"{server}/flows/", body={"name": "erase"}).body["id"]
    other = http_clients.request(f"{server}/flows/", body={"name": "other"}).body["id"]
    every = {"schedule": {"cron": "0 1 * * 0"}, "active": True}
    ours = {"flow_id": flow, "entrypoint": ENTRYPOINT, "schedules": [every]}
    theirs = {"flow_id": other, "entrypoint": "other.py:other", "paused": True}
    for body in ({"name": "chain", **ours}, {"name": "gpu", **ours}, {"name": "chain", **theirs}):
        http_clients.request(f"{server}/deployments/", body={"work_pool_name": "cpu", **body})
    by_topic = diagnoses()
    assert worst(by_topic["pools"][:1]).message == "cpu has no worker"
    assert [line.message for line in by_topic["schedules"]] == ["2 deployments, 2 schedules"]
    http_clients.request(f"{server}/work_pools/cpu/workers/heartbeat", body={"name": "one"})
    assert worst(diagnoses()["pools"][:1]).message == "cpu: 1 worker"


def test_an_unreachable_server_hides_no_other_check(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    by_topic = diagnoses()
    for topic in ("scheduler", "schedules", "clock"):
        assert worst(by_topic[topic]).status == "fail"
        assert "does not respond" in worst(by_topic[topic]).message
    assert worst(by_topic["disk"]).status != "fail"
    assert worst(by_topic["aliases"]).status == "ok"

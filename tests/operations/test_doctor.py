"""The doctor names what is wrong with a deployment, and what to type; against real stores and a real Prefect server."""

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
from deleatur.operations.doctor import Line, look
from deleatur.registry.decisions import registry_of
from deleatur.registry.mlflow_client import CHAMPION
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


def found() -> dict[str, list[Line]]:
    lines = list(look(Path("params.yaml")))
    return {about: [line for line in lines if line.about == about] for about in dict.fromkeys(x.about for x in lines)}


def worst(lines: list[Line]) -> Line:
    return max(lines, key=lambda line: ("ok", "warn", "fail").index(line.state))


def test_a_project_on_one_machine_is_sound(released: Path) -> None:
    seen = found()
    assert {about for about, lines in seen.items() if worst(lines).state == "fail"} == set()
    assert worst(seen["results"]).state == "ok"
    assert not list((released / "remote").glob("doctor-*")), "what was put there was taken away"
    assert worst(seen["scheduler"]).next == "export PREFECT_API_URL=http://…/api"
    assert worst(seen["signatures"]).state == "warn"
    assert any("version 1 is live" in line.what for line in seen["aliases"])


def test_what_fails_is_said_with_what_to_do_and_hides_nothing_else(released: Path, tmp_path: Path) -> None:
    own = registry_of(Settings.load())
    own.client.create_model_version(own.model, str(tmp_path))
    own.client.set_registered_model_alias(own.model, CHAMPION, "2")
    (tmp_path / "file").write_text("")
    finished.dvc(released, "remote", "modify", "store", "url", str(tmp_path / "file" / "no-folder"))
    try:
        result = CliRunner().invoke(app, ["doctor", "--json"])
        assert result.exit_code == 1
        said = {line["about"]: line for line in json.loads(result.stdout) if line["state"] == "fail"}
        assert set(said) == {"aliases", "results"}
        assert "moved by hand: champion is version 2, and by the ledger version 1" in said["aliases"]["what"]
        assert said["aliases"]["next"].startswith("deleatur settle")
        text = CliRunner().invoke(app, ["doctor"]).output
        assert "fail aliases" in text
        assert "deleatur settle --as NAME --reason WHY" in text
    finally:
        own.client.set_registered_model_alias(own.model, CHAMPION, "1")
        own.client.delete_model_version(own.model, "2")
        finished.dvc(released, "remote", "modify", "store", "url", str(released / "remote"))


def test_settings_that_do_not_validate_end_it(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("seed: 1")
    with chdir(tmp_path):
        result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)[-1]["about"] == "settings"


def test_a_library_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "requires", lambda name: ["torch<1", "no-such-thing>=2", "rich>=13", 'x>1; extra == "dev"']
    )
    said = [line for line in doctor._versions() if line.state == "fail"]
    assert [line.what.split(" is wanted")[0] for line in said] == ["torch<1", "no-such-thing>=2"]


def test_files_with_credentials_that_others_can_read_are_named(released: Path) -> None:
    secret = released / "infra" / ".env"
    secret.parent.mkdir()
    secret.write_text("A=b")
    secret.chmod(0o644)
    assert worst(found()["credentials"]).next == "chmod 600 infra/.env"
    secret.chmod(0o600)
    assert worst(found()["credentials"]).state == "ok"


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


def test_a_scheduler_that_nobody_prepared_and_one_that_is(server: str) -> None:
    seen = found()
    assert worst(seen["scheduler"]).next == "python flows/setup.py"
    assert [line.what for line in seen["pools"]] == [
        "the server has no work pool cpu",
        "the server has no work pool gpu",
        "no limit counts the slots of a GPU: two stages may meet on one",
    ]
    assert worst(seen["schedules"]).what == "not deployed: chain, gpu"
    assert worst(seen["registry"]).state == "warn", "a file of this machine"
    assert worst(seen["results"]).state == "warn"
    assert worst(seen["policy"]).state == "warn"
    assert "clock of Prefect" in seen["clock"][0].what

    http_clients.ask(f"{server}/work_pools/", body={"name": "cpu", "type": "process"})
    flow = http_clients.ask(f"{server}/flows/", body={"name": "erase"}).said["id"]
    other = http_clients.ask(f"{server}/flows/", body={"name": "other"}).said["id"]
    every = {"schedule": {"cron": "0 1 * * 0"}, "active": True}
    ours = {"flow_id": flow, "entrypoint": ENTRYPOINT, "schedules": [every]}
    theirs = {"flow_id": other, "entrypoint": "other.py:other", "paused": True}
    for body in ({"name": "chain", **ours}, {"name": "gpu", **ours}, {"name": "chain", **theirs}):
        http_clients.ask(f"{server}/deployments/", body={"work_pool_name": "cpu", **body})
    seen = found()
    assert worst(seen["pools"][:1]).what == "cpu has no worker"
    assert [line.what for line in seen["schedules"]] == ["2 deployments, 2 schedules"]
    http_clients.ask(f"{server}/work_pools/cpu/workers/heartbeat", body={"name": "one"})
    assert worst(found()["pools"][:1]).what == "cpu: 1 worker"


def test_a_server_that_does_not_answer_hides_nothing_else(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    seen = found()
    for about in ("scheduler", "schedules", "clock"):
        assert worst(seen[about]).state == "fail"
        assert "does not answer" in worst(seen[about]).what
    assert worst(seen["disk"]).state != "fail"
    assert worst(seen["aliases"]).state == "ok"

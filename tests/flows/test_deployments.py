"""One command deploys everything, by itself; what a person can set has a type and a meaning on the server's pages."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from deleatur.errors import SettingsError
from deleatur.operations import doctor
from deleatur.operations.http_clients import Scheduler

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "prefect.yaml").read_text("utf-8"))
DEPLOYMENTS = {deployment["entrypoint"]: deployment for deployment in CONFIG["deployments"]}


def test_every_flow_of_ours_has_a_deployment() -> None:
    flows = {f"flows/{p.name}" for p in (ROOT / "flows").glob("*.py") if "@flow(" in p.read_text("utf-8")}
    assert {entrypoint.partition(":")[0] for entrypoint in DEPLOYMENTS} == flows


def test_runs_that_are_started_again_are_those_that_nobody_waits_for() -> None:
    for entrypoint, deployment in DEPLOYMENTS.items():
        on_workers = entrypoint in ("flows/stage.py:stage", "flows/canary.py:look")
        assert ("goes-on" in deployment["tags"]) is not on_workers, "it is started again by the flow that sent it"
        assert deployment["work_pool"]["name"] == ("gpu" if on_workers else "cpu")
        assert "deleatur" in deployment["tags"]
        assert int(deployment["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]) == 30


@pytest.mark.parametrize("pool", ["cpu", "gpu"])
@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_templates_fill_what_they_declare(kind: str, pool: str) -> None:
    template = json.loads((ROOT / "infra" / "pools" / f"{kind}-{pool}.json").read_text("utf-8"))
    text = json.dumps(template["job_configuration"])
    for name in template["variables"]["properties"]:
        assert f"{{{{ {name} }}}}" in text
        text = text.replace(f"{{{{ {name} }}}}", "")
    assert "{{" not in text, "a placeholder that no variable fills"


def prefect(env: dict[str, str], cwd: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "prefect", *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_everything_is_deployed_by_one_command(
    server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.automations import Automation
    from prefect.client.orchestration import get_client
    from setup import TELL, automations, main, setup

    monkeypatch.setenv(TELL, "https://hooks.example/services/x")
    for name in ("flows", "prefect.yaml", "infra"):
        place = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        place(ROOT / name, tmp_path / name)
    try:
        for kind in ("docker", "kubernetes"):
            setup(kind, [], [])
            with pytest.raises(SettingsError, match=f"of the type process, and it is of the type {kind}"):
                setup("process", [], [])
            cleared()
        for slots in (2, 1):
            monkeypatch.setattr(sys, "argv", ["setup.py", "--gpu", f"gpu:{slots}"])
            main()
        prefect(server, tmp_path, "--no-prompt", "deploy", "--all")
        with get_client(sync_client=True) as client:
            assert client.read_global_concurrency_limit_by_name("gpu").limit == 1
            for entrypoint, asked in DEPLOYMENTS.items():
                flow = entrypoint.partition(":")[2]
                found = client.read_deployment_by_name(f"{flow}/{asked['name']}")
                assert found.work_pool_name == asked["work_pool"]["name"]
                assert [s.schedule.cron for s in found.schedules] == [s["cron"] for s in asked.get("schedules", [])]
                parameters = found.parameter_openapi_schema["properties"]
                assert all(p.get("description") for p in parameters.values()), parameters
            stage = client.read_deployment_by_name("stage/gpu")
            assert stage.parameter_openapi_schema["properties"]["name"]["enum"][0] == "reward"
            [clone] = stage.pull_steps
            assert clone["prefect.deployments.steps.git_clone"]["commit_sha"] == "{{ $DELEATUR_COMMIT }}"
            pool = client.read_work_pool("gpu")
            assert pool.type == "process"
        names = [automation.name for automation in automations([uuid4()])]
        for name in names:
            assert Automation.read(name=name).name == name
        with get_client(sync_client=True) as client:
            assert len(client.read_automations()) == len(names), "each once, however often it is set up"
            monkeypatch.chdir(tmp_path)
            for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
                monkeypatch.setenv(name, server[name])
            assert complaints() == ["cpu has no worker", "gpu has no worker"], "nothing is missing but machines"
            sync = client.read_deployment_by_name("feedback/sync")
            client.update_deployment_schedule(sync.id, sync.schedules[0].id, active=False)
            client.delete_global_concurrency_limit_by_name("gpu")
            assert set(complaints()) - {"cpu has no worker", "gpu has no worker"} == {
                "no limit counts the slots of a GPU: two stages may meet on one",
                "sync: the schedule */30 * * * * is off",
            }
    finally:
        cleared()


def complaints() -> list[str]:
    """What `deleatur doctor` does not like about this server."""
    scheduler = Scheduler.named()
    found = (*doctor._scheduler(scheduler), *doctor._pools(scheduler), *doctor._schedules(scheduler))
    return [line.what for line in found if line.state != "ok"]


def cleared() -> None:
    """Other tests share the server, and expect none of this."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs():
            client.delete_flow_run(run.id)
        for deployment in client.read_deployments():
            client.delete_deployment(deployment.id)
        for pool in client.read_work_pools():
            client.delete_work_pool(pool.name)
        for automation in client.read_automations():
            client.delete_automation(automation.id)
        for limit in client.read_global_concurrency_limits():
            client.delete_global_concurrency_limit_by_name(limit.name)

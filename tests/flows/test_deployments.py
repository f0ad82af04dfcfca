"""One command deploys everything; every parameter has a type and a description in the server's UI."""

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
from deleatur.operations.http_clients import PrefectClient

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "prefect.yaml").read_text("utf-8"))
DEPLOYMENTS = {deployment["entrypoint"]: deployment for deployment in CONFIG["deployments"]}


def test_every_flow_has_a_deployment() -> None:
    flows = {f"flows/{p.name}" for p in (ROOT / "flows").glob("*.py") if "@flow(" in p.read_text("utf-8")}
    assert {entrypoint.partition(":")[0] for entrypoint in DEPLOYMENTS} == flows


def test_runs_that_another_flow_waits_for_are_not_restarted_by_the_server() -> None:
    for entrypoint, deployment in DEPLOYMENTS.items():
        on_workers = entrypoint in ("flows/stage.py:stage", "flows/canary.py:canary_check")
        assert ("restart" in deployment["tags"]) is not on_workers, "it is started again by the flow that sent it"
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
def test_one_command_deploys_everything(
    server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.automations import Automation
    from prefect.client.orchestration import get_client
    from setup import NOTIFY_VARIABLE, automations, main, setup

    monkeypatch.setenv(NOTIFY_VARIABLE, "https://hooks.example/services/x")
    for name in ("flows", "prefect.yaml", "infra"):
        place = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        place(ROOT / name, tmp_path / name)
    try:
        for kind in ("docker", "kubernetes"):
            setup(kind, [], [])
            with pytest.raises(SettingsError, match=f"have the type process, got {kind}"):
                setup("process", [], [])
            clear_server()
        for slots in (2, 1):
            monkeypatch.setattr(sys, "argv", ["setup.py", "--gpu", f"gpu:{slots}"])
            main()
        prefect(server, tmp_path, "--no-prompt", "deploy", "--all")
        with get_client(sync_client=True) as client:
            assert client.read_global_concurrency_limit_by_name("gpu").limit == 1
            deployed = {deployment.entrypoint: deployment for deployment in client.read_deployments()}
            for entrypoint, config in DEPLOYMENTS.items():
                deployment = deployed[entrypoint]
                assert deployment.name == config["name"]
                assert deployment.work_pool_name == config["work_pool"]["name"]
                crons = [s.schedule.cron for s in deployment.schedules]
                assert crons == [s["cron"] for s in config.get("schedules", [])]
                parameters = deployment.parameter_openapi_schema["properties"]
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
            assert len(client.read_automations()) == len(names), "setup is idempotent"
            monkeypatch.chdir(tmp_path)
            for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING"):
                monkeypatch.setenv(name, server[name])
            assert doctor_complaints() == ["cpu has no worker", "gpu has no worker"]
            sync = client.read_deployment_by_name("feedback/sync")
            client.update_deployment_schedule(sync.id, sync.schedules[0].id, active=False)
            client.delete_global_concurrency_limit_by_name("gpu")
            assert set(doctor_complaints()) - {"cpu has no worker", "gpu has no worker"} == {
                "no concurrency limit for GPUs: two stages may share one",
                "sync: the schedule */30 * * * * is disabled",
            }
    finally:
        clear_server()


def doctor_complaints() -> list[str]:
    """Warnings and failures of `deleatur doctor` about this server."""
    scheduler = PrefectClient.from_environment()
    diagnoses = (*doctor._scheduler(scheduler), *doctor._pools(scheduler), *doctor._schedules(scheduler))
    return [line.message for line in diagnoses if line.status != "ok"]


def clear_server() -> None:
    """Remove everything from the server, which the tests of a session share."""
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

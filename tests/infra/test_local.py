"""The servers as local processes have the settings of their containers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from programs import INFRA

sys.path.insert(0, str(INFRA))

from local import DEFAULT_PORTS, MissingProgram, Stack


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return Stack(tmp_path, webhook="http://127.0.0.1/webhook")


@pytest.mark.parametrize("name", ["mlflow", "prefect"])
def test_processes_have_the_settings_of_containers(stack: Stack, name: str) -> None:
    service = yaml.safe_load((INFRA / "compose.yaml").read_text("utf-8"))["services"][name]
    server = stack._server(name, None)
    ours = [str(word) for word in server.command]
    address_option = re.compile(r"--(host|port|workers|expose-prometheus)\b|0\.0\.0\.0")
    for word in service["command"][2:]:
        assert address_option.search(word) or word in ours, word
    assert {k for k in service["environment"] if k.startswith("MLFLOW") and "HOSTS" not in k} <= set(server.env)
    assert {k for k in service["environment"] if k.startswith("PREFECT")} <= set(server.env)


def test_prometheus_scrapes_local_addresses(stack: Stack) -> None:
    try:
        stack._server("prometheus", None)
    except MissingProgram as e:
        pytest.skip(str(e))
    config = yaml.safe_load((stack.folder / "prometheus.yml").read_text("utf-8"))
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    assert targets == {
        "deleatur": [f"127.0.0.1:{DEFAULT_PORTS['exporter']}"],
        **{name: [f"127.0.0.1:{DEFAULT_PORTS[name]}"] for name in ("mlflow", "prefect", "prometheus")},
    }
    assert (stack.folder / "prometheus.yml").stat().st_mode & 0o077 == 0, "passwords are in it"
    assert (stack.folder / "passwords.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("program", ["local.py", "rehearsal.py"])
def test_help_names_the_folder(program: str) -> None:
    result = subprocess.run([sys.executable, INFRA / program, "--help"], capture_output=True, text=True, check=True)
    assert "FOLDER" in result.stdout

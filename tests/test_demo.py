"""`deleatur demo`: verdict, next commands, the error of a failed stage, interruption."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import finished
import pytest
import yaml
from child_processes import stage_processes

from deleatur.errors import Interrupted

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path, shared: Path) -> Path:
    finished.copy(shared, tmp_path)
    return tmp_path


def demo(project: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Runs in a shell without an activated virtual environment."""
    from deleatur.storage.processes import environment

    bare = environment() | {"PATH": "/usr/bin:/bin", "COLUMNS": "200"}
    command = [sys.executable, "-m", "deleatur", "demo", *options]
    return subprocess.run(command, cwd=project, env=bare, capture_output=True, text=True)


def test_a_finished_chain_is_registered_and_prints_the_next_commands(project: Path) -> None:
    done = demo(project)
    assert done.returncode == 0, done.stderr
    assert "Verdict: pass" in done.stdout
    assert "Up to date: ingest, reward, invert, erase, attack, sample, evaluate, gate" in done.stderr
    assert "  deleatur report --open" in done.stdout
    assert "deleatur export erased" in done.stdout
    output = json.loads(demo(project, "--json").stdout)
    assert output["verdict"]["outcome"] == "pass"
    assert (project / output["contact_sheet"]).is_file()
    assert len(output["next"]) == 3


@pytest.mark.parametrize(
    ("code", "file", "old", "new", "message"),
    [
        (4, "models/clip/config.json", "{", "[", "ModelError: reward: "),
        (3, "prompts/weapon.csv", "concept", "consept", "DataError: prompts/weapon.csv, line 2: role"),
        (2, "params.yaml", "seed: 42", "sede: 42", "SettingsError: params.yaml has 2 problem"),
    ],
)
def test_demo_ends_with_the_error_of_the_failed_stage(
    project: Path, code: int, file: str, old: str, new: str, message: str
) -> None:
    path = project / file
    path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")
    done = demo(project)
    assert done.returncode == code
    assert message in done.stderr
    assert "Next: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("cold")
def test_ctrl_c_interrupts_the_stage_and_prints_how_to_resume(project: Path) -> None:
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text("utf-8"))
    params["erase"]["sdd"]["training"]["lr"] *= 2
    path.write_text(yaml.safe_dump(params, sort_keys=False), "utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "deleatur", "demo"],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )
    while not list(stage_processes("erase", process.pid)):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == Interrupted.exit_code
    assert "Interrupted: erase was interrupted" in stderr
    assert "deleatur demo (resumes)" in stderr

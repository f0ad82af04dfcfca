"""The flow and DVC share results; settings errors are not retried; a person can be asked for approval."""

from __future__ import annotations

import contextvars
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import finished
import pytest
import yaml
from child_processes import stage_processes

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("server")]

from prefect import flow  # noqa: E402
from prefect.client.orchestration import get_client  # noqa: E402
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey  # noqa: E402

from deleatur.config.settings import Settings  # noqa: E402
from deleatur.errors import Interrupted, SettingsError  # noqa: E402
from deleatur.registry.decisions import open_registry  # noqa: E402
from deleatur.registry.mlflow_registry import CHALLENGER, CHAMPION  # noqa: E402
from deleatur.stages import register  # noqa: E402
from deleatur.storage import dvc, processes  # noqa: E402


@pytest.fixture
def project(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished project, as the current directory."""
    finished.copy(shared, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change_section(section: str, **changes: Any) -> None:
    path = Path("params.yaml")
    params = yaml.safe_load(path.read_text("utf-8"))
    params[section] |= changes
    path.write_text(yaml.safe_dump(params, sort_keys=False), "utf-8")


def latest_artifact(key: str) -> Any:
    with get_client(sync_client=True) as client:
        artifacts = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))
    return artifacts[-1].data if artifacts else None


def test_flow_and_dvc_recognise_each_others_results(project: Path) -> None:
    from erase import erase

    change_section("sample", shard_size=5)
    done = erase()
    assert (done.stages_run, done.outcome) == (("sample", "evaluate", "gate"), "pass")
    assert latest_artifact("progress-sample") == 100.0
    assert "PASS" in latest_artifact("verdict")
    assert "a gun" not in latest_artifact("verdict"), "contains no prompt"
    registry = open_registry(Settings.load())
    assert registry.alias(CHAMPION) == "1"
    assert dvc.status(project) == {}
    assert "Running stage" not in finished.dvc(project, "repro")

    change_section("gate", **finished.passing_policy(limit=-6.0))
    assert "Running stage 'gate'" in finished.dvc(project, "repro")
    done = erase()
    assert done.stages_run == (), "`dvc repro` had run everything"
    assert registry.alias(CHAMPION) == "2"


def test_a_wrong_setting_is_refused_before_any_stage_runs(project: Path) -> None:
    from erase import erase

    change_section("erase", sdd={"bogus": 1})
    with pytest.raises(SettingsError, match="bogus"):
        erase()
    with get_client(sync_client=True) as client:
        runs = [run for run in client.read_task_runs(limit=200) if run.name == "erase"]
    assert not [run for run in runs if run.state and run.state.is_failed()], "refused before any stage runs"


def test_an_interrupted_stage_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    import tasks

    tries: list[str] = []

    def interrupted_once(stage: str, *_: Any) -> bool:
        tries.append(stage)
        if len(tries) == 1:
            raise Interrupted("saved at step 3")
        return True

    monkeypatch.setattr(dvc, "reproduce", interrupted_once)

    @flow
    def one() -> bool:
        return tasks.reproduce.with_options(retry_delay_seconds=0)("erase")

    assert one() is True
    assert tries == ["erase", "erase"]


def test_sigterm_saves_and_names_the_command_to_resume(project: Path, server: dict[str, str]) -> None:
    change_section("erase", sdd={})  # only this stage is stale, and takes long
    script = Path(__file__).parents[2] / "flows" / "erase.py"
    env = {name: value for name, value in server.items() if name != "WARM_SOCKET"}  # as the fixture `cold`
    process = subprocess.Popen(
        [sys.executable, script], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not list(stage_processes("erase", process.pid)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.terminate()
    stdout, _ = process.communicate(timeout=600)
    assert process.returncode == Interrupted.exit_code, stdout
    assert "to resume" in stdout


@pytest.mark.parametrize("decision", ["approve", "decline"])
def test_approval_is_requested_if_the_policy_requires_it(
    project: Path, decision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from erase import erase

    change_section("register", approval=True)
    settings = Settings.load()
    monkeypatch.setattr(dvc, "status", lambda root: {})
    monkeypatch.setattr(dvc, "reproduce", lambda stage, *_: False)
    monkeypatch.setattr(dvc, "run_untracked", lambda stage, *_: register.run(settings))
    answer = {"approver": "Ada", "decision": decision, "reason": "looked at the sheet"}
    person = threading.Thread(target=contextvars.copy_context().run, args=(answer_form, answer), daemon=True)
    person.start()
    done = erase(poll_seconds=1)
    assert done.decision == decision
    registry = open_registry(settings)
    assert registry.alias(CHAMPION) == ("1" if decision == "approve" else None)
    event = {"approve": "approval", "decline": "decline"}[decision]
    assert f"{event} by Ada: looked at the sheet" in registry.description("1")
    assert registry.alias(CHALLENGER) is None


def test_the_script_starts_and_stops_an_embedded_server(
    project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """`python flows/erase.py` without a Prefect server."""
    home = tmp_path_factory.mktemp("prefect")
    change_section("gate", **finished.passing_policy(limit=-6.0))
    code, stdout, stderr = run_script(home)
    assert code == 0, stderr
    assert stdout.splitlines()[-1] == "ErasureResult(stages_run=('gate',), outcome='pass', decision=None)"
    assert open_registry(Settings.load()).alias(CHAMPION) == "1"
    assert (home / "prefect.db").is_file(), "its own database"

    change_section("erase", sdd={"bogus": 1})
    code, _, stderr = run_script(home)
    assert code == SettingsError.exit_code
    assert "bogus" in stderr
    assert "\nNext: correct params.yaml, then: deleatur check" in stderr


def run_script(home: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; checks that no process of its group is left."""
    without = {name: value for name, value in processes.environment().items() if not name.startswith("PREFECT_")}
    child = subprocess.Popen(
        [sys.executable, str(finished.ROOT / "flows" / "erase.py")],
        env={**without, "PREFECT_HOME": str(home), "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = child.communicate(timeout=1200)
    finally:
        with pytest.raises(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    return child.returncode, stdout, stderr


def answer_form(answer: dict[str, str]) -> None:
    """Find the paused run and submit its form, as a person does in the UI."""
    with get_client(sync_client=True) as client:
        for _ in range(600):
            for run in client.read_flow_runs():
                if run.state and run.state.is_paused():
                    client.resume_flow_run(run.id, run_input=answer)
                    return
            time.sleep(0.2)


def test_only_a_server_with_a_ui_offers_a_form() -> None:
    from erase import has_ui
    from prefect.settings import PREFECT_API_URL, temporary_settings

    assert has_ui()
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert not has_ui()

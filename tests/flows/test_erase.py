"""The flow and DVC recognise each other's work; a wrong setting is not tried twice; a person can be asked."""

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
from killed import running

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("server")]

from prefect import flow  # noqa: E402
from prefect.client.orchestration import get_client  # noqa: E402
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey  # noqa: E402

from deleatur.config.settings import Settings  # noqa: E402
from deleatur.errors import ContinueMe, SettingsError  # noqa: E402
from deleatur.registry.decisions import registry_of  # noqa: E402
from deleatur.registry.mlflow_client import CHALLENGER, CHAMPION  # noqa: E402
from deleatur.stages import register  # noqa: E402
from deleatur.storage import dvc  # noqa: E402


@pytest.fixture
def project(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished project, as the current directory."""
    finished.copy(shared, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(section: str, **numbers: Any) -> None:
    path = Path("params.yaml")
    params = yaml.safe_load(path.read_text("utf-8"))
    params[section] |= numbers
    path.write_text(yaml.safe_dump(params, sort_keys=False), "utf-8")


def latest(key: str) -> Any:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))
    return found[-1].data if found else None


def test_after_the_flow_dvc_finds_nothing_to_do_and_after_dvc_the_flow_only_registers(project: Path) -> None:
    from erase import erase

    change("sample", shard=5)
    done = erase()
    assert (done.ran, done.outcome) == (("sample", "evaluate", "gate"), "pass")
    assert latest("progress-sample") == 100.0
    assert "PASS" in latest("verdict")
    assert "a gun" not in latest("verdict"), "no prompt that asks for the concept"
    registry = registry_of(Settings.load())
    assert registry.alias(CHAMPION) == "1"
    assert dvc.status(project) == {}
    assert "Running stage" not in finished.dvc(project, "repro")

    change("gate", **finished.passing(limit=-6.0))
    assert "Running stage 'gate'" in finished.dvc(project, "repro")
    done = erase()
    assert done.ran == (), "all of it had been done by `dvc repro`"
    assert registry.alias(CHAMPION) == "2"


def test_a_wrong_setting_is_not_tried_again(project: Path) -> None:
    from erase import erase

    change("erase", sdd={"bogus": 1})
    with pytest.raises(SettingsError, match="bogus"):
        erase()
    with get_client(sync_client=True) as client:
        runs = [run for run in client.read_task_runs(limit=200) if run.name == "erase"]
    assert [run.run_count for run in runs if run.state and run.state.is_failed()] == [1]


def test_a_stage_that_was_stopped_is_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    import tasks

    tries: list[str] = []

    def stopped_once(stage: str, *_: Any) -> bool:
        tries.append(stage)
        if len(tries) == 1:
            raise ContinueMe("saved at step 3")
        return True

    monkeypatch.setattr(dvc, "reproduce", stopped_once)

    @flow
    def one() -> bool:
        return tasks.reproduce.with_options(retry_delay_seconds=0)("erase")

    assert one() is True
    assert tries == ["erase", "erase"]


def test_whoever_stops_the_flow_is_told_to_run_it_again(project: Path, server: dict[str, str]) -> None:
    change("erase", source="words")
    script = Path(__file__).parents[2] / "flows" / "erase.py"
    us = subprocess.Popen(
        [sys.executable, script], env=server, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not list(running("erase", us.pid)):
        assert us.poll() is None, us.communicate()[0]
        time.sleep(0.1)
    us.terminate()
    said, _ = us.communicate(timeout=120)
    assert us.returncode == ContinueMe.exit_code, said
    assert "to go on" in said


@pytest.mark.parametrize("decision", ["approve", "decline"])
def test_a_person_is_asked_where_the_policy_says_so(
    project: Path, decision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from erase import erase

    change("register", approval=True)
    settings = Settings.load()
    monkeypatch.setattr(dvc, "status", lambda root: {})
    monkeypatch.setattr(dvc, "reproduce", lambda stage, *_: False)
    monkeypatch.setattr(dvc, "perform", lambda stage, *_: register.run(settings))
    answer = {"approver": "Ada", "decision": decision, "reason": "looked at the sheet"}
    person = threading.Thread(target=contextvars.copy_context().run, args=(answered, answer), daemon=True)
    person.start()
    done = erase(poll_seconds=1)
    assert done.decision == decision
    registry = registry_of(settings)
    tags = registry.tags("1")
    if decision == "approve":
        assert (registry.alias(CHAMPION), tags["approved_by"]) == ("1", "Ada")
    else:
        assert (registry.alias(CHAMPION), tags["declined_by"]) == (None, "Ada")
    assert registry.alias(CHALLENGER) is None


def test_the_script_needs_no_server_and_leaves_none_behind(
    project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """`python flows/erase.py` where nothing of Prefect runs: an embedded server starts and ends with it."""
    home = tmp_path_factory.mktemp("prefect")
    change("gate", **finished.passing(limit=-6.0))
    code, said, complained = script(home)
    assert code == 0, complained
    assert said.splitlines()[-1] == "Done(ran=('gate',), outcome='pass', decision=None)"
    assert registry_of(Settings.load()).alias(CHAMPION) == "1"
    assert (home / "prefect.db").is_file(), "its own database, not somebody's"

    change("erase", sdd={"bogus": 1})
    code, _, complained = script(home)
    assert code == SettingsError.exit_code
    assert "bogus" in complained
    assert "\nNext: deleatur methods erasers" in complained


def script(home: Path) -> tuple[int, str, str]:
    """Exit code, output and errors; nothing of its process group is left."""
    without = {name: value for name, value in dvc.environment().items() if not name.startswith("PREFECT_")}
    child = subprocess.Popen(
        [sys.executable, str(finished.ROOT / "flows" / "erase.py")],
        env={**without, "PREFECT_HOME": str(home), "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, complained = child.communicate(timeout=1200)
    finally:
        with pytest.raises(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    return child.returncode, said, complained


def answered(answer: dict[str, str]) -> None:
    """What a person does on the server's page: finds the run that waits, and fills in its form."""
    with get_client(sync_client=True) as client:
        for _ in range(600):
            for run in client.read_flow_runs():
                if run.state and run.state.is_paused():
                    client.resume_flow_run(run.id, run_input=answer)
                    return
            time.sleep(0.2)


def test_a_form_is_offered_only_where_somebody_can_open_it() -> None:
    from erase import has_pages
    from prefect.settings import PREFECT_API_URL, temporary_settings

    assert has_pages()
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        assert not has_pages()

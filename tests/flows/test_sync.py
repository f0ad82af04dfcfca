"""New feedback is fetched and ingested; enough of it starts the chain, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import finished
import numpy as np
import prefect_workers
import pytest
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("server")]

from prefect.client.orchestration import get_client  # noqa: E402
from prefect.client.schemas.filters import FlowFilter, FlowFilterName  # noqa: E402
from prefect.states import Failed, Pending, Running, Suspended  # noqa: E402
from prefect_workers import wait_until  # noqa: E402
from test_deployments import clear_server, prefect  # noqa: E402

from deleatur.artifacts.simulated_feedback import simulate  # noqa: E402
from deleatur.config.settings import Settings  # noqa: E402
from deleatur.feedback.simulated import Panel  # noqa: E402
from deleatur.registry import approval  # noqa: E402
from deleatur.stages import register  # noqa: E402
from deleatur.storage import dvc  # noqa: E402


@pytest.fixture
def project(tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "project"
    finished.copy(shared, root)
    prefect_workers.change_params(root, feedback={"inbox": str(tmp_path / "inbox"), "min_new": 10})
    monkeypatch.chdir(root)
    return root


def write_answers(inbox: Path, name: str, count: int) -> int:
    """Write answers about new images; their number."""
    rng = np.random.default_rng(len(name))
    images = [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]
    spec = Settings.load().concepts["weapon"]
    panel = Panel(raters=6, per_question=4)
    options: dict[str, Any] = {"panel": panel, "model_version": "tiny", "seed": len(name), "out": inbox}
    simulate("weapon", spec, images, ["a gun"] * count, range(count), [0.5] * count, **options)
    for end in (".jsonl", ".images.parquet"):
        (inbox / f"weapon{end}").rename(inbox / f"{name}{end}")
    return len((inbox / f"{name}.jsonl").read_text().splitlines())


def chain_runs() -> list[Any]:
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=["erase"])))


def test_enough_new_feedback_starts_the_chain_once(project: Path, tmp_path: Path, server: dict[str, str]) -> None:
    import feedback
    from setup import setup

    for name in ("flows", "prefect.yaml"):
        (project / name).symlink_to(prefect_workers.ROOT / name)
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    try:
        setup("process", [], [])
        before = {run.id for run in chain_runs()}
        prefect(server, project, "--no-prompt", "deploy", "--name", "chain")

        def started() -> list[Any]:
            return [
                r for r in chain_runs() if r.id not in before and r.idempotency_key and "feedback" in r.idempotency_key
            ]

        wait_until(lambda: bool({run.id for run in chain_runs()} - before), "a later run of the schedule")
        assert feedback.feedback() == 0
        first_count = write_answers(inbox, "some", 2)
        assert feedback.feedback() == first_count < 10
        assert started() == []
        second_count = write_answers(inbox, "others", 4)
        assert feedback.feedback() == first_count + second_count >= 10
        [run] = started()
        assert feedback.feedback() == 0, "one run at a time"
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run.id, Failed(), force=True)
        assert feedback.feedback() == first_count + second_count, "still newer than the last report"
        assert [r.id for r in started()] == [run.id], "one run per state of the feedback"
    finally:
        clear_server()


def test_without_a_deployment_the_chain_runs_in_process(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import feedback

    started: list[str] = []
    monkeypatch.setattr(feedback, "erase", lambda: started.append("here"))
    monkeypatch.setattr(feedback, "chain_is_active", lambda: False)
    (tmp_path / "inbox").mkdir()
    new = write_answers(tmp_path / "inbox", "some", 2)
    assert feedback.feedback(min_new=new) == new
    assert started == ["here"]


def test_a_suspended_run_blocks_ingestion_until_its_version_is_decided(
    project: Path, server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import feedback
    from setup import setup

    for name in ("flows", "prefect.yaml"):
        (project / name).symlink_to(prefect_workers.ROOT / name)
    prefect_workers.change_params(project, register={"approval": True})
    settings = Settings.load()
    with monkeypatch.context() as patch:
        patch.setattr(dvc, "status", lambda root: {})
        register.run(settings)
    (project.parent / "inbox").mkdir()
    write_answers(project.parent / "inbox", "some", 2)
    try:
        setup("process", [], [])
        prefect(server, project, "--no-prompt", "deploy", "--name", "chain")
        with get_client(sync_client=True) as client:
            chain = client.read_deployment_by_name("erase/chain").id
            run = client.create_flow_run_from_deployment(chain, state=Pending()).id
            client.set_flow_run_state(run, Running(), force=True)
            client.set_flow_run_state(run, Suspended(pause_key="evidence"))
            assert feedback.feedback() == 0
            assert not Path("feedback/some.jsonl").exists(), "the approver was not shown it"
            approval.decline(settings, "1", "Ada")
            assert feedback.feedback() > 0
            assert client.read_flow_run(run).state.is_cancelled()
    finally:
        clear_server()

"""New feedback is fetched and ingested; enough of it starts the chain, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import finished
import machines
import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("server")]

from machines import awaited  # noqa: E402
from prefect.client.orchestration import get_client  # noqa: E402
from prefect.client.schemas.filters import FlowFilter, FlowFilterName  # noqa: E402
from prefect.states import Failed, Pending, Running, Suspended  # noqa: E402
from test_deployments import cleared, prefect  # noqa: E402

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
    machines.change(root, feedback={"inbox": str(tmp_path / "inbox"), "min_new": 10})
    monkeypatch.chdir(root)
    return root


def arrives(inbox: Path, name: str, pictures: int) -> int:
    """Answers about new pictures; how many."""
    rng = np.random.default_rng(len(name))
    drawn = [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(pictures)]
    spec = Settings.load().concepts["weapon"]
    panel = Panel(raters=6, per_question=4)
    asked: dict[str, Any] = {"panel": panel, "model_version": "tiny", "seed": len(name), "out": inbox}
    simulate("weapon", spec, drawn, ["a gun"] * pictures, range(pictures), [0.5] * pictures, **asked)
    for end in (".jsonl", ".images.parquet"):
        (inbox / f"weapon{end}").rename(inbox / f"{name}{end}")
    return len((inbox / f"{name}.jsonl").read_text().splitlines())


def runs() -> list[Any]:
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=["erase"])))


def test_enough_new_feedback_starts_the_chain_once(project: Path, tmp_path: Path, server: dict[str, str]) -> None:
    import feedback
    from setup import setup

    for name in ("flows", "prefect.yaml"):
        (project / name).symlink_to(machines.ROOT / name)
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    try:
        setup("process", [], [])
        before = {run.id for run in runs()}
        prefect(server, project, "--no-prompt", "deploy", "--name", "chain")

        def begun() -> list[Any]:
            return [r for r in runs() if r.id not in before and r.idempotency_key and "feedback" in r.idempotency_key]

        awaited(lambda: bool({run.id for run in runs()} - before), "a run of the schedule, of a later day")
        assert feedback.feedback() == 0
        few = arrives(inbox, "some", 2)
        assert feedback.feedback() == few < 10
        assert begun() == []
        many = arrives(inbox, "others", 4)
        assert feedback.feedback() == few + many >= 10
        [run] = begun()
        assert feedback.feedback() == 0, "one thing at a time"
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run.id, Failed(), force=True)
        assert feedback.feedback() == few + many, "the last report does not know them yet"
        assert [r.id for r in begun()] == [run.id], "once for the same answers"
    finally:
        cleared()


def test_where_nothing_is_deployed_the_chain_runs_here(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import feedback

    begun: list[str] = []
    monkeypatch.setattr(feedback, "erase", lambda: begun.append("here"))
    monkeypatch.setattr(feedback, "chain_is_at_work", lambda: False)
    (tmp_path / "inbox").mkdir()
    new = arrives(tmp_path / "inbox", "some", 2)
    assert feedback.feedback(min_new=new) == new
    assert begun == ["here"]


def test_a_run_that_waits_for_an_answer_is_at_work_until_it_was_decided_elsewhere(
    project: Path, server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import feedback
    from setup import setup

    for name in ("flows", "prefect.yaml"):
        (project / name).symlink_to(machines.ROOT / name)
    machines.change(project, register={"approval": True})
    settings = Settings.load()
    with monkeypatch.context() as patch:
        patch.setattr(dvc, "status", lambda root: {})
        register.run(settings)
    (project.parent / "inbox").mkdir()
    arrives(project.parent / "inbox", "some", 2)
    try:
        setup("process", [], [])
        prefect(server, project, "--no-prompt", "deploy", "--name", "chain")
        with get_client(sync_client=True) as client:
            chain = client.read_deployment_by_name("erase/chain").id
            run = client.create_flow_run_from_deployment(chain, state=Pending()).id
            client.set_flow_run_state(run, Running(), force=True)
            client.set_flow_run_state(run, Suspended(pause_key="evidence"))
            assert feedback.feedback() == 0
            assert not Path("feedback/some.jsonl").exists(), "whoever answers has not seen it"
            approval.decline(settings, "1", "Ada")
            assert feedback.feedback() > 0
            assert client.read_flow_run(run).state.is_cancelled()
    finally:
        cleared()
